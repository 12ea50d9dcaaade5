"""Run by `make wheel-test` in an environment that has only the wheel: is it whole, and used?

Usage: python check_wheel.py WHEEL   (with a working directory outside the checkout)
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path


def main(wheel: str) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ucan_fast"}, f"the wheel installs more than ucan_fast: {sorted(tops)}"
    for needed in ("ucan_fast/__init__.py", "ucan_fast/kernels/__init__.py", "ucan_fast/py.typed"):
        assert needed in names, f"{needed} is not in the wheel"

    installed = Path(sysconfig.get_path("purelib")).resolve()
    import ucan_fast
    import ucan_fast.kernels
    from ucan_fast import native

    for module in (ucan_fast, ucan_fast.kernels):
        assert installed in Path(module.__file__).resolve().parents, f"{module.__file__} was used"
    spec = importlib.util.find_spec("kernels")
    assert spec is None or installed not in Path(spec.origin or "").resolve().parents, spec
    print("native extension:", native.status())
    built = any(name.startswith("ucan_fast/_C.") for name in names)
    assert (native.status()["_C"] == "available") == built, native.status()
    main_job(ucan_fast)
    shown = subprocess.run(
        [Path(sys.executable).parent / "ucan-fast", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    print(f"wheel {Path(wheel).name}: installed, imported and used from {Path.cwd()}")


def main_job(uf) -> None:
    """collect, plan, apply, undo on a model of a few thousand parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **shape))
    names = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = get_peft_model(base, adapter).eval()

    def batch(low: int, high: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(low, high, (4, 12))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    before = {name: value.clone() for name, value in model.state_dict().items()}
    uf.accelerate(model)
    bank = uf.collect(model, [batch(0, 25), batch(25, 50)])
    forget = uf.collect(model, [batch(0, 25)], group="forget")
    retain = uf.collect(model, [batch(25, 50)])
    plan = uf.make_plan(model, forget + retain, uf.UcanConfig(min_score=0.0))
    assert bank.layers.keys() == retain.layers.keys()
    plan.apply(model)
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed
    assert all("lora_" in name for name in changed), changed
    plan.undo(model)
    uf.restore(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"undo did not bring back {name}"


if __name__ == "__main__":
    main(sys.argv[1])
