"""Convert a checkpoint that you trust from PyTorch's own format (.pt, .pth, .bin) to safetensors.

    python tools/to_safetensors.py HPS_v2.1_compressed.pt hpsv21/model.safetensors

Only tensors are read (weights_only), from the top level or from under "state_dict" or "model". This is no part of the
package: the library itself loads safetensors alone.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    found = torch.load(source, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found.get(key), dict) else found
    weights = {name: tensor.contiguous().clone() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, target)
    print(f"{len(weights)} tensors written to {target}")


if __name__ == "__main__":
    main()
