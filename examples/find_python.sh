#!/bin/sh
# Prints the path of a Python that can make this project's virtual environment, or says what to do and exits with 1.
#
#     sh examples/find_python.sh
#     PYTHON=/path/to/python3 sh examples/find_python.sh
#
# Looked at in this order: $PYTHON (and nothing else, where it is set), python3.12 and python3.13 on PATH, python3 and
# python, pyenv's versions, uv's. The wheels of megatron-core 0.19.2 are for Python 3.12 and 3.13.
# Uses nothing but the shell: it has to say something useful even where PATH is empty.

rejected=""

try() { # prints the interpreter behind $1 and exits, if $1 is usable; else remembers why not
    case $1 in
        */*) [ -x "$1" ] || return 0 ;;
        *) command -v "$1" >/dev/null 2>&1 || return 0 ;;
    esac
    answer=$("$1" -c '
import sys
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    sys.exit(print("it is Python %d.%d" % sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(print("it has no module %s (Debian, Ubuntu: apt install python3-venv)" % error.name))
print("usable", sys._base_executable)  # the one behind a virtual environment that is active
' 2>/dev/null)
    case $answer in
        "usable "*) printf '%s\n' "${answer#usable }" && exit 0 ;;
    esac
    rejected="$rejected
    $1: ${answer:-it does not start}"
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    [ -n "$rejected" ] || rejected="
    $PYTHON: no such program"
    printf 'PYTHON=%s cannot be used; set it to a Python 3.12 or 3.13, or unset it:%s\n' "$PYTHON" "$rejected" >&2
    exit 1
fi

for name in python3.12 python3.13 python3 python; do
    try "$name"
done
for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python; do
    try "$path"
done
if command -v uv >/dev/null 2>&1; then
    for version in 3.12 3.13; do
        path=$(uv python find --no-project "$version" 2>/dev/null) && try "$path"
    done
fi
for path in "${XDG_DATA_HOME:-${HOME:-}/.local/share}"/uv/python/cpython-3.1[23]*/bin/python3; do
    try "$path"
done

printf '%s%s\n' "No Python 3.12 or 3.13 with venv was found (megatron-core 0.19.2 needs one)." \
    "${rejected:+ Found, but not usable:$rejected}" "
Get one in any of these ways, then run the same command again:
    uv python install 3.12
    pyenv install 3.12
    conda create -n py312 python=3.12 && conda activate py312
    apt install python3.12 python3.12-venv        (Ubuntu 24.04; Debian 13: python3.13, python3.13-venv)
or name one that is installed elsewhere:
    PYTHON=/path/to/python3.12 make demo" >&2
exit 1
