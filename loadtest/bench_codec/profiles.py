"""Which codecs a run measures, with the profiles that some of them need.

Covers: the shipped or named profile of `transform`; a profile of `cachegen`, calibrated here. Does not cover:
calibrating `transform` (`learnonce calibrate`).

`cachegen` gets the same kinds of text for its tables as the documents have, from parts that no document uses, and keeps
the sinks exact as `transform` does: the comparison is of schemes, not of calibrations.
"""

from typing import Final

import torch

from cluster.errors import LearnonceError, UnavailableError
from kvstore.codecs import codec_by_name
from kvstore.codecs.cachegen_calibrate import calibrate_cachegen
from kvstore.codecs.cachegen_profile import CachegenProfile
from kvstore.codecs.profile import Profile
from kvstore.engine.profiles import load_profile, misfit, shipped_profiles
from loadtest.bench_codec import CodecBenchSettings, Log
from loadtest.bench_codec.exact import ExactModel, Tokenizer, kv_shape
from loadtest.bench_codec.schemes import CachegenScheme, CodecScheme, Scheme, TransformScheme
from loadtest.bench_codec.texts import calibration_documents
from loadtest.work import Work, reference_name

_PLAIN: Final = ("int4", "int8", "lossless", "raw")
_CALIBRATION_TOKENS: Final = 2048
"""Of each of the texts."""
_NUM_EXACT: Final = 1
_CACHEGEN_FILE: Final = "cachegen"


class NoProfileError(UnavailableError):
    """No profile of the transform codec fits the model."""


def read_schemes(
    settings: CodecBenchSettings, *, log: Log, num_threads: int = 1
) -> tuple[list[Scheme], dict[str, str]]:
    """Every codec that can run here, and why others cannot, by name.

    Args:
        settings: Say which model, profile and texts.
        log: Told what takes long.
        num_threads: Of codecs that use several.
    """
    schemes: list[Scheme] = []
    missing: dict[str, str] = {}
    try:
        schemes.append(TransformScheme(transform_profile(settings), num_threads=num_threads))
    except LearnonceError as error:
        missing["transform"] = str(error)
    try:
        cachegen = cachegen_profile(settings, log=log)
        schemes += [CachegenScheme(cachegen, level=level) for level in range(cachegen.num_levels)]
    except LearnonceError as error:
        missing["cachegen"] = str(error)
    return [*schemes, *(CodecScheme(codec_by_name(name)) for name in _PLAIN)], missing


def transform_profile(settings: CodecBenchSettings) -> Profile:
    """The profile that the command names, else the shipped one that fits the model.

    Raises:
        NoProfileError: None fits.
        SettingsError: The command names no profile.
    """
    num_layers, num_kv_heads, head_dim = kv_shape(settings.model)
    if settings.profile is not None:
        named = load_profile(settings.profile)
        if named is None:
            raise NoProfileError(f"profile {settings.profile[:12]!r} is in no file: a benchmark has no store to ask")
        problem = misfit(named, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if problem:
            raise NoProfileError(problem)
        return named
    for shipped in shipped_profiles():
        if misfit(shipped, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim) is None:
            return shipped
    raise NoProfileError(
        "no shipped profile fits the model: make one with `learnonce calibrate`, name it with --profile"
    )


def cachegen_profile(settings: CodecBenchSettings, *, log: Log) -> CachegenProfile:
    """Bins and tables for the model, calibrated on the run's texts; once per work folder.

    Raises:
        DataMissingError: The texts are not here.
    """
    tokenize = Tokenizer(settings.model)
    documents = calibration_documents(settings.data, num_tokens=_CALIBRATION_TOKENS, tokenize=tokenize)
    name = reference_name(settings.model, [word for each in documents for word in each.ids], (_NUM_EXACT,))
    path = settings.work / f"{_CACHEGEN_FILE}-{name}.profile"
    if path.is_file():
        return CachegenProfile.from_bytes(path.read_bytes())
    log(f"calibrating cachegen on {', '.join(each.name for each in documents)}")
    exact = ExactModel.load(settings.model)
    chunks = [exact.read(each.ids, keep=[], kv_tokens=len(each.ids))[0].to(torch.bfloat16) for each in documents]
    profile = calibrate_cachegen(
        chunks,
        model=settings.model.rpartition("/")[2],
        num_exact=_NUM_EXACT,
        notes={"texts": ", ".join(each.name for each in documents)},
    )
    Work.write_whole(path, profile.to_bytes())
    return profile
