"""Hostile adapter files: `Adapter.read` refuses each with an `AdapterError` that names the tensor or field."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import Adapter, AdapterError, LayoutCache
from tests.support.adapter_files import CONFIG, GOOD, METADATA, PREPROCESS, SHAPES, arrays, pack, raw


def with_metadata(**changed: str) -> bytes:
    return pack(arrays(), METADATA | changed)


def with_preprocess(**changed: Any) -> bytes:
    return with_metadata(preprocess=json.dumps(PREPROCESS | changed))


def with_config(**changed: Any) -> bytes:
    return with_metadata(config=json.dumps(CONFIG | changed))


def with_value(name: str, value: float) -> bytes:
    tensors = arrays()
    tensors[name].flat[-1] = value
    return pack(tensors)


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a good file with a changed header."""
    length = struct.unpack("<Q", GOOD[:8])[0]
    header = json.loads(GOOD[8 : 8 + length])
    change(header)
    return raw(json.dumps(header, separators=(",", ":")).encode(), GOOD[8 + length :])


def of(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name][key] = value

    return change


NESTED = "[" * 100_000 + "]" * 100_000
FC2 = "blocks.0.mlp.fc2"

WRONG_BYTES = {
    "nothing": (b"", "file: not a safetensors file: 0 bytes are too few for its header"),
    "seven bytes": (GOOD[:7], "file: not a safetensors file: 7 bytes are too few"),
    "no safetensors": (
        b"\x89PNG\r\n\x1a\n" + b"pixels" * 100,
        "file: not a safetensors file, or its header is too long",
    ),
    "a pickle": (
        b"\x80\x04\x95\x00\x00\x00\x00\x00cos\nsystem\n",
        "file: not a safetensors file, but a pickle or zip",
    ),
    "a header of 10 GB": (
        struct.pack("<Q", 10 * 1024**3) + GOOD[8:],
        "file: not a safetensors file, or its header is too long: the header claims 10737418240 bytes, at most 4194304",
    ),
    "a header of 2^64 - 1": (
        struct.pack("<Q", 2**64 - 1) + GOOD[8:],
        "file: .*the header claims 18446744073709551615 bytes",
    ),
    "a truncated header": (GOOD[:300], "file: truncated: the header claims .* bytes, but only 292 follow"),
    "truncated tensors": (GOOD[:-1], "file: truncated: its tensors need .* bytes, but the file has"),
    "bytes after the tensors": (GOOD + b"\0", "file: not a valid safetensors file: .*incomplete metadata"),
    "an empty header": (raw(b""), "file: not a safetensors file: its header is not valid JSON"),
    "a header that is a list": (raw(b"[]"), "file: not a safetensors file: its header must be a JSON object"),
    "a header that is not UTF-8": (raw(b'{"\xff": 1}'), "file: not a safetensors file: its header is not valid JSON"),
    "a header in UTF-16": (raw("{}".encode("utf-16")), "file: not a safetensors file: its header is not valid JSON"),
    "a nested header": (raw(NESTED.encode()), "file: .*its header is not valid JSON .maximum recursion depth"),
    "half a surrogate in a name": (raw(b'{"\\ud800": {"dtype": "I8"}}'), r"file: .*not valid JSON .*ud800"),
    "a number beyond a float": (
        raw(b'{"head.bias": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', b"1234"),
        "file: not a safetensors file: its header is not valid JSON .1e999 is not a JSON number that fits a float",
    ),
    "a tensor twice": (
        raw(b'{"head.bias": {"dtype": "F32"}, "head.bias": {"dtype": "F32"}}'),
        "file: .*not valid JSON .the key 'head.bias' appears twice",
    ),
    "metadata twice": (
        raw(b'{"__metadata__": {}, "__metadata__": {}}'),
        "file: .*the key '__metadata__' appears twice",
    ),
    "a field twice": (
        raw(b'{"__metadata__": {"format": "a", "format": "b"}}'),
        "file: .*the key 'format' appears twice",
    ),
    "overlapping tensors": (
        with_header(of("head.bias", "data_offsets", [0, 8])),
        "file: not a valid safetensors file: .*invalid offset for tensor `.*`",
    ),
    "offsets the wrong way round": (
        with_header(of("head.bias", "data_offsets", [8, 0])),
        "file: not a valid safetensors file: .*`head.bias`",
    ),
    "negative offsets": (with_header(of("head.bias", "data_offsets", [-8, 0])), "file: not a valid safetensors file"),
    "offsets beyond the file": (
        with_header(of("head.bias", "data_offsets", [0, 2**62])),
        "file: truncated: its tensors need 46116860184273[0-9]* bytes",
    ),
    "one offset": (with_header(of("head.bias", "data_offsets", [0])), "file: not a valid safetensors file"),
    "a shape unlike its bytes": (
        with_header(of("head.bias", "shape", [3])),
        "file: not a valid safetensors file: .*invalid shape",
    ),
    "a shape whose product overflows": (
        with_header(of("head.bias", "shape", [2**40, 2**40])),
        "file: not a valid safetensors file",
    ),
    "a tensor that is a number": (pack(arrays(), spare=1), "spare: has dtype None, expected one of F32, F16, BF16"),
    "a tensor without dtype": (pack(arrays(), spare={}), "spare: has dtype None, expected one of F32, F16, BF16"),
    "a dtype that is a list": (
        pack(arrays(), spare={"dtype": ["F32"]}),
        r"spare: has dtype \['F32'\], expected one of",
    ),
    "a header of very many values": (
        raw(b'{"a": [' + b"[]," * 150_000 + b"[]]}"),
        "file: its header has too many values; at most 150000 are allowed",
    ),
    "too many tensors": (
        pack({}, **{f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}),
        "file: has 10001 tensors, but at most 10000 are allowed",
    ),
}

WRONG_METADATA = {
    "none": (pack(arrays(), {}), "format: is missing from the metadata, so this is not a karst/1 file; convert it"),
    "none of ours": (
        pack({"w": np.zeros(1, np.float32)}, {"note": "{}"}),
        "format: is missing from the metadata, so this is not a karst/1 file; convert it",
    ),
    "of transformers": (
        pack({"w": np.zeros(1, np.float32)}, {"format": "pt"}),
        "format: is 'pt', expected 'karst/1'; convert it",
    ),
    "a list": (pack(arrays(), ["format"]), "__metadata__: must be a JSON object whose values are all strings"),
    "null": (pack(arrays(), None), "__metadata__: must be a JSON object whose values are all strings"),
    "a number": (
        pack(arrays(), METADATA | {"format": 1}),
        "__metadata__: must be a JSON object whose values are all strings",
    ),
    "an object": (
        pack(arrays(), METADATA | {"config": CONFIG}),
        "__metadata__: must be a JSON object whose values are all strings",
    ),
    "another format": (with_metadata(format="karst/2"), "format: is 'karst/2', expected 'karst/1'"),
    "a short fingerprint": (
        with_metadata(fingerprint="abc"),
        "fingerprint: is 'abc', expected a SHA-256 digest of 64 lower-case hex digits",
    ),
    "a newline in the fingerprint": (
        with_metadata(fingerprint="0" * 64 + "\n"),
        "fingerprint: is '0000.*expected a SHA-256",
    ),
    "config no JSON": (with_metadata(config="{"), "config: is not valid JSON .Expecting property name"),
    "config a list": (with_metadata(config="[]"), "config: is .., expected a JSON object with factor, gain, kernels"),
    "config nested": (with_metadata(config=NESTED), "config: is not valid JSON .maximum recursion depth exceeded"),
    "a field of config missing": (
        with_metadata(config='{"rank": 2}'),
        "config: has wrong keys .missing factor, gain, kernels, rescale., expected factor, gain, kernels, rank,",
    ),
    "a field of config more": (with_config(alpha=1), "config: has wrong keys .unknown 'alpha'."),
    "a field of config twice": (
        with_metadata(config='{"rank": 2, "rank": 3}'),
        "config: is not valid JSON .the key 'rank' appears twice",
    ),
    "a rank bomb": (with_config(rank=10**9), "config: rank is .*: Input should be less than or equal to 1024"),
    "a kernel bomb": (
        with_config(kernels=10**9),
        "config: kernels is 1000000000: Input should be less than or equal to 256",
    ),
    "a factor of 0": (with_config(factor=0), "config: factor is 0: Input should be greater than or equal to 1"),
    "a rank as text": (with_config(rank="2"), "config: rank is .*: Input should be a valid integer"),
    "no gain": (with_config(gain=None), "config: gain is null, expected a positive number"),
    "a negative gain": (with_config(gain=-1), "config: gain is -1: Input should be greater than 0"),
    "a gain of NaN": (with_config(gain=float("nan")), "config: is not valid JSON .NaN is not a JSON number"),
    "a gain beyond a float": (
        with_metadata(config=json.dumps(CONFIG).replace("0.5", "1e999")),
        "config: is not valid JSON",
    ),
    "a gain of 400 digits": (with_config(gain=10**400), "config: gain is 1000.*"),
    "an unknown re-scaling": (
        with_config(rescale="all"),
        "config: rescale is 'all': Input should be 'channel', 'scalar' or",
    ),
    "labels no list": (
        with_metadata(labels='{"a": 1}'),
        "labels: is .*, expected a JSON list of at least one non-empty string",
    ),
    "no labels": (with_metadata(labels="[]"), "labels: is .*, expected a JSON list of at least one non-empty string"),
    "an empty label": (
        with_metadata(labels='["", "a"]'),
        "labels: is .*, expected a JSON list of at least one non-empty",
    ),
    "a label that is a number": (
        with_metadata(labels='["a", 1]'),
        "labels: is .*, expected a JSON list of at least one",
    ),
    "labels twice": (with_metadata(labels='["a", "a"]'), "labels: must be unique, but 'a' appear more than once"),
    "labels nested": (with_metadata(labels=NESTED), "labels: is not valid JSON .maximum recursion depth exceeded"),
    "half a surrogate in a label": (with_metadata(labels='["a", "\\ud800"]'), "labels: .*surrogates not allowed"),
    "more labels than the head has": (
        with_metadata(labels='["a", "b", "c"]'),
        r"head.weight: has shape \(2, 4\), expected \(3, D\) for 3 labels; head.bias: has shape \(2,\), expected",
    ),
    "metrics a list": (with_metadata(metrics="[]"), "metrics: is .., expected a JSON object"),
    "metrics nested": (with_metadata(metrics=NESTED), "metrics: is not valid JSON .maximum recursion depth exceeded"),
    "metrics nested deeper than others can read": (
        with_metadata(metrics='{"a": ' + "[" * 150 + "]" * 150 + "}"),
        "metrics: has 151 levels of nesting, but at most 32 are allowed",
    ),
    "metrics with a number beyond a float": (
        with_metadata(metrics='{"a": 1e999}'),
        "metrics: is not valid JSON .1e999 is not a JSON number that fits a float",
    ),
    "preprocess a list": (with_metadata(preprocess="[]"), "preprocess: is .., expected a JSON object with crop_mode"),
    "four channels": (with_preprocess(input_size=[4, 32, 32]), "preprocess: input_size has 4 channels, expected 3"),
    "an input of 0 pixels": (
        with_preprocess(input_size=[3, 0, 32]),
        "preprocess: input_size is .*, expected .channels, height",
    ),
    "a huge input": (with_preprocess(input_size=[3, 10**6, 10**6]), "preprocess: input_size .* each from 1 to 4096"),
    "a side that is true": (with_preprocess(input_size=[3, True, 32]), "preprocess: input_size is .*True"),
    "a mean of two": (with_preprocess(mean=[0, 0]), "preprocess: mean is .*, expected three numbers"),
    "a mean of 400 digits": (
        with_preprocess(mean=[10**400, 0, 0]),
        "preprocess: mean is .*, expected values from 0 to 1",
    ),
    "a negative mean": (with_preprocess(mean=[0, -1, 0]), "preprocess: mean is .*, expected values from 0 to 1"),
    "a mean beyond a float": (
        with_metadata(preprocess=json.dumps(PREPROCESS).replace("0.5", "1e999")),
        "preprocess: is not valid JSON .1e999 is not a JSON number that fits a float",
    ),
    "a mean of text": (with_preprocess(mean=["a", 0, 0]), "preprocess: mean is .*, expected three numbers"),
    "a std of 0": (
        with_preprocess(std=[1, 0, 1]),
        "preprocess: std is .1, 0, 1., expected values from 0.0001 to 10000",
    ),
    "a std of 400 digits": (with_preprocess(std=[1, 10**400, 1]), "preprocess: std is .*, expected values from"),
    "a std that a float32 makes 0": (
        with_preprocess(std=[1, 1e-300, 1]),
        "preprocess: std is .*, expected values from",
    ),
    "a crop that enlarges images a thousandfold": (
        with_preprocess(crop_pct=0.001),
        "preprocess: crop_pct is 0.001, expected a number from 0.5 to 2",
    ),
    "a background of text": (
        with_preprocess(background="white"),
        "preprocess: background is 'white', expected three integers from 0 to 255",
    ),
    "a background of two": (with_preprocess(background=[0, 0]), r"preprocess: background is \[0, 0\], expected three"),
    "a background of 256": (
        with_preprocess(background=[0, 0, 256]),
        r"preprocess: background is \[0, 0, 256\], expected",
    ),
    "a background of truths": (
        with_preprocess(background=[True] * 3),
        r"preprocess: background is \[True, True, True\], ",
    ),
    "a crop of 0": (with_preprocess(crop_pct=0), "preprocess: crop_pct is 0, expected"),
    "an unknown interpolation": (
        with_preprocess(interpolation="sinc"),
        "preprocess: interpolation is 'sinc', expected one of",
    ),
    "an interpolation that is a list": (
        with_preprocess(interpolation=[]),
        r"preprocess: interpolation is \[\], expected one of",
    ),
    "an unknown crop": (
        with_preprocess(crop_mode="all"),
        "preprocess: crop_mode is 'all', expected one of center, squash, border",
    ),
}

WRONG_TENSORS = {
    "NaN": (with_value(f"{FC2}.karst_a", np.nan), f"{FC2}.karst_a: has a value that is not finite"),
    "infinity": (with_value("head.weight", np.inf), "head.weight: has a value that is not finite"),
    "minus infinity": (with_value(f"{FC2}.shift", -np.inf), f"{FC2}.shift: has a value that is not finite"),
    "F64": (pack(arrays(bias=np.zeros(2, np.float64))), "head.bias: has dtype F64, expected one of F32, F16, BF16"),
    "I32": (pack(arrays(karst_c=np.zeros((1, 2, 2), np.int32))), f"{FC2}.karst_c: has dtype I32, expected one of"),
    "no head": (
        pack(arrays(weight=None, bias=None)),
        "head.weight: is missing; .*; head.bias: is missing; an adapter needs",
    ),
    "no bias": (pack(arrays(bias=None)), "head.bias: is missing"),
    "no A": (pack(arrays(karst_a=None)), f"{FC2}.karst_a: is missing, but {FC2}.karst_c is present"),
    "no C and B": (pack(arrays(karst_c=None, karst_b=None)), f"{FC2}.karst_c, {FC2}.karst_b: is missing, but"),
    "no shift": (pack(arrays(shift=None)), f"{FC2}.shift: is missing, but {FC2}.scale is present"),
    "an extra tensor": (
        pack(arrays() | {f"{FC2}.weight": np.zeros((2, 2), np.float32)}),
        f"{FC2}.weight: is not a tensor of a karst/1 file .head.weight, head.bias, typicality.mean",
    ),
    "a tensor without a layer": (
        pack(arrays() | {"scale": np.zeros(1, np.float32)}),
        "scale: is not a tensor of a karst",
    ),
    "re-scaling of the head": (
        pack(arrays() | {f"head.{part}": np.zeros(1, np.float32) for part in ("scale", "shift")}),
        "head.scale: is not a tensor of a karst/1 file .*; head.shift: is not a tensor",
    ),
    "C of two axes": (
        pack(arrays(karst_c=np.zeros((2, 2), np.float32))),
        rf"{FC2}.karst_c: has shape \(2, 2\), expected \(N, p, q\)",
    ),
    "B without numbers": (
        pack(arrays(karst_b=np.zeros((1, 0, 3), np.float32))),
        rf"{FC2}.karst_b: has shape \(1, 0, 3\), expected \(N, r, d_in/q\)",
    ),
    "a scale that is a matrix": (pack(arrays(scale=np.zeros((8, 8), np.float32))), rf"{FC2}.scale: has shape \(8, 8\)"),
    "a head of one axis": (pack(arrays(weight=np.zeros(2, np.float32))), r"head.weight: has shape \(2,\), expected"),
    "a bias that is a scalar": (pack(arrays(bias=np.zeros((), np.float32))), r"head.bias: has shape \(\), expected"),
    "fewer rows than labels": (pack(arrays(weight=np.zeros((1, 4), np.float32))), r"head.weight: has shape \(1, 4\)"),
    "kernels unlike config": (
        with_config(kernels=2),
        rf"{FC2}.karst_\*: have 1, 1, 1 kernels \(C, A, B\), expected config.kernels = 2",
    ),
    "kernels unlike each other": (
        pack(arrays(karst_b=np.zeros((2, 2, 3), np.float32))),
        rf"{FC2}.karst_\*: have 1, 1, 2 kernels \(C, A, B\), expected config.kernels = 1",
    ),
    "a rank over config": (
        with_config(rank=1),
        rf"{FC2}.karst_\*: have ranks 2 \(A\) and 2 \(B\), expected equal ranks up to config.rank = 1",
    ),
    "ranks unlike each other": (
        pack(arrays(karst_b=np.zeros((1, 1, 3), np.float32))),
        rf"{FC2}.karst_\*: have ranks 2 \(A\) and 1 \(B\), expected equal ranks up to config.rank = 2",
    ),
    "re-scaling against config": (
        with_config(rescale="none"),
        f"{FC2}: has re-scaling tensors, but config.rescale is none; remove them",
    ),
}

HOSTILE = {
    f"{group}: {name}": case
    for group, cases in (("bytes", WRONG_BYTES), ("metadata", WRONG_METADATA), ("tensors", WRONG_TENSORS))
    for name, case in cases.items()
}


def test_read_accepts_the_good_file() -> None:
    adapter = Adapter.read(GOOD)
    assert adapter.labels == ("cat", "dog")
    assert {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()} == SHAPES


@pytest.mark.parametrize("layout_known", [False, True])
@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_read_names_the_defect_of_a_hostile_file(data: bytes, message: str, layout_known: bool) -> None:
    """A known layout skips checks, so the cases run with and without a cached layout of the good file."""
    layouts = LayoutCache()
    if layout_known:
        Adapter.read(GOOD, layouts=layouts)
    with pytest.raises(AdapterError, match=f"^{message}") as refusal:
        Adapter.read(data, layouts=layouts)
    assert refusal.value.problems
    assert len(str(refusal.value).encode()) < 2000  # a lone surrogate would not encode


@pytest.mark.parametrize("field", ["config", "backbone", "fingerprint", "labels", "preprocess"])
def test_read_names_a_missing_field(field: str) -> None:
    with pytest.raises(AdapterError, match=f"^{field}: is missing from the metadata; add it"):
        Adapter.read(pack(arrays(), {k: v for k, v in METADATA.items() if k != field}))


def test_read_collects_all_problems_in_a_short_message() -> None:
    with pytest.raises(AdapterError, match=r"; and 3 more$") as refusal:
        Adapter.read(pack({f"t{i}": np.zeros(1, np.float32) for i in range(6)}))
    assert [p.where for p in refusal.value.problems] == [*(f"t{i}" for i in range(6)), "head.weight", "head.bias"]


def test_read_refuses_a_large_file_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as f:
        f.truncate(10 * 1024**4)  # a sparse file of 10 TB
    with pytest.raises(
        AdapterError, match=r"huge.safetensors: has 10995116277760 bytes, but at most 1000000 are allowed"
    ):
        Adapter.read(path, max_bytes=1_000_000)


@settings(deadline=None)
@given(data=st.data())
def test_read_accepts_or_refuses_any_mutation(data: st.DataObject) -> None:
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(mutated)] * 3 + [None]))
    assert_read_or_refused(bytes(mutated[: data.draw(st.integers(0, len(mutated))) if end is None else end]))


BEYOND = st.sampled_from([10**400, 1e300, 1e-300, "\ud800", "a" * 300])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | BEYOND,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)), key=st.sampled_from(["dtype", "shape", "data_offsets", "more"]), value=JSON
)
def test_read_accepts_or_refuses_any_header_entry(name: str, key: str, value: Any) -> None:
    assert_read_or_refused(with_header(of(name, key, value)))


@settings(deadline=None)
@given(field=st.sampled_from(["config", "labels", "preprocess", "metrics"]), value=JSON)
def test_read_accepts_or_refuses_any_metadata(field: str, value: Any) -> None:
    assert_read_or_refused(with_metadata(**{field: json.dumps(value)}))


@settings(deadline=None)
@given(name=st.sampled_from(sorted(CONFIG)), part=st.sampled_from(sorted(PREPROCESS)), value=JSON)
def test_read_accepts_or_refuses_any_config_and_preprocess_value(name: str, part: str, value: Any) -> None:
    assert_read_or_refused(with_config(**{name: value}))
    assert_read_or_refused(with_preprocess(**{part: value}))


def assert_read_or_refused(data: bytes) -> None:
    try:
        adapter = Adapter.read(data)
    except AdapterError as refusal:
        str(refusal).encode()
    else:
        assert adapter.data == data
        assert all(tensor.isfinite().all() for tensor in adapter.tensors.values())
        json.dumps([adapter.labels, adapter.preprocess, adapter.metrics], allow_nan=False, ensure_ascii=False).encode()
