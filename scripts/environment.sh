# Sourced by the other scripts.
#   make_environment FOLDER EXTRAS      create a virtual environment with qtorch (once)
#   make_qlib_environment FOLDER BASE   create one with real Qlib, for comparisons (once); it uses the
#                                       packages of the environment BASE, which has the extra "dev"
# Both use the tested versions of constraints.txt. The stamp is written last, so the next call
# continues an interrupted installation.

QLIB_VERSION=0.9.7

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
    local folder=$1 extras=$2
    if ! is_complete "$folder" "$extras"; then
        echo "installing qtorch into $folder (this takes a few minutes the first time)" >&2
        create "$folder" "$extras" -e ".$extras"
    fi
}

make_qlib_environment() {
    local folder=$1 base=$2
    if ! has_qlib_environment "$folder" "$base"; then
        rm -rf "$folder"
        # pyqlib's source distribution would need a compiler.
        BASE=$base create "$folder" "$(qlib_content "$base")" --only-binary=pyqlib \
            "pyqlib==$QLIB_VERSION"
    fi
}

# has_qlib_environment FOLDER BASE
has_qlib_environment() {
    is_complete "$1" "$(qlib_content "$2")"
}

qlib_content() {
    echo "pyqlib $QLIB_VERSION in addition to $(cd "$1" 2>/dev/null && pwd)"
}

# is_complete FOLDER CONTENT: whether the environment was made with these files and this content
is_complete() {
    [ "$(cat "$1/.qtorch-stamp" 2>/dev/null)" = "$(print_stamp "$2")" ]
}

print_stamp() {
    echo "$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)$1"
}

# create FOLDER CONTENT ARGUMENTS...: create an environment and run `pip install ARGUMENTS` in it.
# BASE is the folder of another environment whose packages it uses too.
create() {
    local folder=$1 content=$2 python options=(--quiet --disable-pip-version-check)
    shift 2
    python=$(find_python) || return 1
    "$python" -m venv "$folder" || {
        echo "python's venv module is missing; on Debian: apt-get install python3-venv" >&2
        return 1
    }
    if [ -n "${BASE:-}" ]; then
        "$BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$(echo "$folder"/lib/python*/site-packages)/base.pth" || return 1
    fi
    # Modules are compiled when they are first imported; compiling all of them takes minutes.
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || options+=(--no-compile)
    # The pip that comes with older Pythons needs twice the time to choose among versions.
    "$folder/bin/python" -m pip install "${options[@]}" "pip>=25.1" || return 1
    # Install torch alone first: with a pinned version, pip takes it from the configured index.
    "$folder/bin/python" -m pip install "${options[@]}" \
        "$(grep '^torch==' constraints.txt)" || return 1
    "$folder/bin/python" -m pip install "${options[@]}" -c constraints.txt "$@" || return 1
    print_stamp "$content" >"$folder/.qtorch-stamp"
}
