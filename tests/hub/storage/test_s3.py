"""The store and adapters by reference on S3: real s3fs against moto's S3 server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub.local.ports import free_port

ROOT = Path(__file__).parents[3]
# s3fs's own dependencies need an older python-dateutil than the tests' packages do.
PACKAGES = re.findall(r"^(?:s3fs|aiobotocore|botocore)==\S+$", (ROOT / "deploy/s3.txt").read_text(), re.MULTILINE)
MOTO = "moto[server]==5.2.5"
GCSFS = "gcsfs==2026.10.1"


@pytest.mark.slow
def test_store_and_references_work_on_s3(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(packages)]
    done = subprocess.run([*install, *PACKAGES, MOTO, GCSFS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    port = free_port()
    variables = {
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "tests.support.s3_program", str(port)]
    checked = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert checked.returncode == 0, checked.stderr[-3000:]
    assert "all checks passed" in checked.stdout
