"""A gateway holds no torch: it decodes images and checks adapter files by Pillow and numpy."""

import pickle
import subprocess
import sys
from pathlib import Path

from adapters import BankLimits, load_backbone
from tests.support.models import random_adapter

HEAVY = ("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib")
CODE = f"""
import pickle, sys
from io import BytesIO
from pathlib import Path
from PIL import Image
import hub.cluster.gateway
import hub.api.app
from adapters import Adapter
from adapters.data.images import decode_image
from adapters.data.transform import pixel_transform
folder = Path(sys.argv[1])
limits = pickle.loads((folder / "limits").read_bytes())
adapter = Adapter.read(folder / "adapter")
limits.check(adapter)
weight, bias = adapter.head()
encoded = BytesIO()
Image.new("RGB", (50, 40)).save(encoded, "JPEG")
assert pixel_transform(adapter.preprocess)(decode_image(encoded.getvalue())).shape[0] == 3
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_gateway_imports_no_torch_when_it_decodes_images_and_checks_adapters(tmp_path: Path) -> None:
    backbone = load_backbone("demo")
    random_adapter(backbone).write(tmp_path / "adapter")
    limits = BankLimits(backbone.info(), max_rank=8, max_kernels=4, factor=8)
    (tmp_path / "limits").write_bytes(pickle.dumps(limits))
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
