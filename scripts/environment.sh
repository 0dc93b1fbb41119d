# Sourced by the other scripts. `make_environment FOLDER EXTRAS` creates a virtual environment in
# FOLDER (once) and installs qtorch into it, with the tested versions of constraints.txt.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "qtorch needs Python 3.11 or newer; none was found (set PYTHON=... to its path)." >&2
    return 1
}

make_environment() {
    local folder=$1 extras=$2 stamp python options=(--quiet --disable-pip-version-check)
    python=$(find_python) || return 1
    stamp=$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)
    if [ "$(cat "$folder/.qtorch-stamp" 2>/dev/null)" != "$stamp$extras" ]; then
        echo "installing qtorch into $folder (this takes a few minutes the first time)" >&2
        "$python" -m venv "$folder" || {
            echo "python's venv module is missing; on Debian: apt-get install python3-venv" >&2
            return 1
        }
        # Modules are compiled when they are first imported; compiling all of them takes minutes.
        [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || options+=(--no-compile)
        # Install torch alone first: with a pinned version, pip takes it from the configured index.
        "$folder/bin/python" -m pip install "${options[@]}" \
            "$(grep '^torch==' constraints.txt)" || return 1
        "$folder/bin/python" -m pip install "${options[@]}" -c constraints.txt -e ".$extras" || return 1
        echo "$stamp$extras" >"$folder/.qtorch-stamp"
    fi
}
