# Sourced by tools/demo and tools/test: sets $root, and makes $root/.venv where it is absent or stale.
# It is stale when pyproject.toml, the constraints or its place have changed. PYTHON names the interpreter to build it with.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
stamp=$(cksum < "$root/pyproject.toml"; cksum < "$root/tools/constraints.txt"; echo "$root")

if [ "$(cat "$root/.venv/stamp" 2>/dev/null)" != "$stamp" ] || ! "$root/.venv/bin/python" -c ''; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "fewbit needs Python 3.10 or newer; set PYTHON to one (found: $("$python" --version 2>&1))" >&2
        exit 1
    }
    echo "Installing fewbit into $root/.venv (a few minutes the first time) ..." >&2
    rm -rf "$root/.venv"
    "$python" -m venv "$root/.venv" || exit 1
    "$root/.venv/bin/python" -m pip install --quiet --quiet --constraint "$root/tools/constraints.txt" --editable "$root[test]" || exit 1
    printf '%s' "$stamp" > "$root/.venv/stamp"
fi
