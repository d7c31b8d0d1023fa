"""The model card of an exported network: what it is, what it was trained on, what it reaches.

The facts of a run come from its folder: `config.yaml`, `consumed.jsonl` (the digest of all samples
it was trained on) and its newest evaluation. What is not there is called unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from measnet import config as configs
from measnet.config import ModelConfig
from measnet.errors import first_line

PAPER = "https://arxiv.org/abs/2407.19139"
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of trained weights beside their config."""

    name: str
    """Title of the card."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What the weights were trained and validated on -> digest or folder."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Options of the training."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """A report of `python -m distributed.evaluate` (summary.json)."""


def facts_of_run(folder: Path, evaluation: Path | None = None) -> Facts:
    """The facts of a run folder; all files are optional.

    Args:
        folder: of the run, such as runs/demo.
        evaluation: a summary.json to take the results from; None: `evaluation/summary.json` in the
            folder, or the run's last validation.

    Raises:
        ValueError, OSError: a file that is there cannot be read.
    """
    config = _read(folder / "config.yaml")
    data: dict[str, str] = {}
    for kind in ("train", "validation"):
        where = str(config.get("data", {}).get(kind, ""))
        manifest = _read(Path(where) / "manifest.json") if where and "://" not in where else {}
        if "fingerprint" in manifest:
            data[f"{kind} shards"] = f"fingerprint {manifest['fingerprint']}"
        elif where:
            data[f"{kind} shards"] = f"folder {Path(where).name}, digest {UNKNOWN}"
    consumed = folder / "consumed.jsonl"
    if consumed.is_file() and (lines := consumed.read_text().splitlines()):
        last = json.loads(lines[-1])
        data["samples trained on"] = f"{last['samples']}, chained sha256 {last['consumed']}"
    report = _read(evaluation) if evaluation else _read(folder / "evaluation" / "summary.json")
    if not report:
        report = (_read(folder / "outcome.json").get("validation") or {}).get("report") or {}
    return Facts(
        name=str(config.get("name") or folder.resolve().name),
        data=data,
        recipe=config.get("recipe", {}),
        evaluation=report,
    )


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping, but {type(content).__name__}")
    return content


def model_card(config: ModelConfig, facts: Facts, parameters: int) -> str:
    """README.md of the folder, with the header that the Hugging Face hub reads."""
    parts = [
        "---\nlicense: other\nlicense_name: see-licence-section\nlibrary_name: measnet-ray\n"
        "pipeline_tag: image-to-image\ntags:\n- image-restoration\n- measnet\n---",
        f"# {facts.name}",
        "Weights of MEASNet, one network that removes haze, rain, noise and blur and brightens "
        f"dark pictures ([paper]({PAPER})). {parameters / 1e6:.2f} million parameters, variant "
        f"`{config.variant}`.",
        "## Use\n\n```python\nfrom measnet.network import MEASNet\nfrom measnet.tiling import "
        'restore\n\nmodel = MEASNet.from_pretrained("FOLDER or owner/name")\nrestored = '
        "restore(model, image)  # (3, H, W) in [0, 1], any size\n```\n\nPicture files: "
        "`python -m measnet.restore IN OUT --weights FOLDER`.",
        "## Results\n\n" + _results(facts.evaluation),
        "## Data\n\n" + _list(facts.data, "What the weights were trained on is unknown."),
        "## Training\n\n" + _list(facts.recipe, "The recipe is unknown."),
        "## Configuration\n\n" + _list(configs.to_dict(config), ""),
        _LIMITS,
        _LICENCE,
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = """## Limits

* Trained for haze, rain, noise, blur and low light in sRGB pictures. Other degradations, and linear
  floats, are outside of what it has seen.
* Synthetic training data differ from photos: results on own photos can be much worse than on the
  benchmarks, and the network can invent detail. Do not use it where a picture is evidence.
* All figures above are from the pictures that the table counts; a part of a benchmark does not
  compare with published figures of all of it."""

_LICENCE = """## Licence

The program is under Apache-2.0. The weights are derived from the training data: check the licences
of these data before you publish or sell anything made with the weights. Many benchmarks of this
field are for research only. If the weights were converted from a checkpoint of the authors'
program, the authors' terms apply to them."""


def _results(report: Mapping[str, Any]) -> str:
    if not report:
        return "Not evaluated: unknown."
    protocol = report.get("protocol", {})
    lines = [
        f"Measured by {protocol.get('description', f'a protocol that is {UNKNOWN}')}.",
        "",
        "| degradation | pictures | PSNR before | PSNR after | SSIM before | SSIM after |",
        "|---|---|---|---|---|---|",
    ]
    rows = {**report.get("degradations", {}), "mean of tasks": report.get("mean", {})}
    for name, row in rows.items():
        count = str(row.get("pictures", UNKNOWN))
        whole = report.get("held", {}).get(name, {}).get("benchmark") or 0
        count += f" of the benchmark's {whole}" if whole else ""
        psnr = (_number(row.get(f"{at}_psnr"), 2) for at in ("input", "restored"))
        ssim = (_number(row.get(f"{at}_ssim"), 4) for at in ("input", "restored"))
        lines.append(f"| {' | '.join([name, count, *psnr, *ssim])} |")
    return "\n".join(lines)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else UNKNOWN


def _list(facts: Mapping[str, Any], otherwise: str) -> str:
    return "\n".join(f"* {name}: `{value}`" for name, value in facts.items()) or otherwise
