# Sourced by the other scripts: make_environment FOLDER EXTRAS creates a virtual environment
# there (once) and installs qtorch into it with the tested versions of constraints.txt.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "qtorch needs Python 3.11 or newer; none was found (PYTHON=... names one)." >&2
    return 1
}

make_environment() {
    local folder=$1 extras=$2 stamp python options=(--quiet --disable-pip-version-check)
    python=$(find_python) || return 1
    stamp=$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)
    if [ "$(cat "$folder/.qtorch-stamp" 2>/dev/null)" != "$stamp$extras" ]; then
        echo "installing qtorch into $folder (the first time takes a few minutes)" >&2
        "$python" -m venv "$folder" || {
            echo "python's venv module is missing; on Debian: apt-get install python3-venv" >&2
            return 1
        }
        # What is used is compiled when it is first imported; all of it would take minutes.
        [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || options+=(--no-compile)
        # torch by itself first: with a version fixed, pip takes it from wherever it is configured to.
        "$folder/bin/python" -m pip install "${options[@]}" \
            "$(grep '^torch==' constraints.txt)" || return 1
        "$folder/bin/python" -m pip install "${options[@]}" -c constraints.txt -e ".$extras" || return 1
        echo "$stamp$extras" >"$folder/.qtorch-stamp"
    fi
}
