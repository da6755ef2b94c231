"""Adapters on a base that is served: as PEFT's own, whatever else runs, comes and goes."""

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.serve.adapters import pool
from raytune_llama.serve.adapters.registry import (
    LISTING_TTL_SECONDS,
    AdapterRegistry,
    RegisteredAdapter,
)
from raytune_llama.serve.errors import BusyError, InvalidRequestError, UnknownModelError
from raytune_llama.storage.files import OUTPUT_MANIFEST, read_json, write_json_atomic
from raytune_llama.storage.place import Place
from tests.serve.adapters.conftest import MakeAdapters, asked, run

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "tables": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "untied": {"modules_to_save": ["lm_head"]},
}


def test_adapters_of_every_kind_answer_as_under_peft_all_at_once(
    make_adapters: MakeAdapters,
) -> None:
    adapters = make_adapters()
    for seed, (name, fields) in enumerate(KINDS.items()):
        adapters.write(name, seed=seed, **fields)
    cases = [(name, p) for name in (None, *KINDS) for p in ("the quick", "x", "人民 日报 over")]
    wanted = [adapters.wanted(*case) for case in cases]
    assert len({text for text, case in zip(wanted, cases, strict=True) if case[1] == "x"}) == 7

    async def main() -> list[str]:
        return await asyncio.gather(*(adapters.text(*case) for case in cases))

    assert run(main) == wanted


def test_16_requests_on_three_adapters_and_the_base_are_as_one_after_another(
    make_adapters: MakeAdapters,
) -> None:
    adapters = make_adapters()
    names = [None, "a", "b", "c"]
    for seed, name in enumerate(("a", "b", "c")):
        adapters.write(name, seed=seed, r=2 + seed)
    cases = [(names[n % 4], "the quick brown fox jumps over"[: 3 + n]) for n in range(16)]

    async def main() -> tuple[list[str], list[str]]:
        together = await asyncio.gather(*(adapters.text(*case) for case in cases))
        return together, [await adapters.text(*case) for case in cases]

    together, alone = run(main)
    assert together == alone == [adapters.wanted(*case) for case in cases]


def test_new_version_under_load_takes_over_without_a_mixed_answer(
    make_adapters: MakeAdapters,
) -> None:
    adapters = make_adapters(max_adapters=1)
    adapters.write("poet", seed=1)
    old = adapters.wanted("poet")
    told: list[str] = []
    is_over = asyncio.Event()

    async def ask() -> None:
        while not is_over.is_set():
            told.append(await adapters.text("poet"))

    async def main() -> str:
        assert await adapters.text("poet") == old
        tasks = [asyncio.create_task(ask()) for _ in range(6)]
        new = await asyncio.to_thread(rewrite)
        await adapters.wait_for("poet", new)
        first_new = len(told)
        while len(told) < first_new + 20:
            await asyncio.sleep(0.01)
        is_over.set()
        await asyncio.gather(*tasks)
        # Those that were running with the old version have ended.
        assert set(told[first_new + 6 :]) == {new}
        return new

    def rewrite() -> str:
        adapters.write("poet", seed=2)
        return adapters.wanted("poet")

    new = run(main)
    assert new != old
    assert set(told) == {old, new}


def test_request_keeps_the_version_that_it_began_with(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters()
    adapters.write("poet", seed=1)
    old = adapters.wanted("poet")

    async def main() -> str:
        async with aclosing(await adapters.pool.respond(asked("tiny:poet"))) as stream:
            first = await anext(stream.deltas)
            adapters.write("poet", seed=2)
            await adapters.wait_for("poet", adapters.wanted("poet"))
            return first.text + "".join([delta.text async for delta in stream.deltas])

    assert run(main) == old


def test_first_request_after_a_new_version_was_written_gets_it(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters()
    adapters.write("poet", seed=1)
    old = adapters.wanted("poet")

    async def main() -> None:
        assert await adapters.text("poet") == old
        adapters.write("poet", seed=2)
        await asyncio.sleep(LISTING_TTL_SECONDS)
        assert await adapters.text("poet") == adapters.wanted("poet") != old

    run(main)


def test_version_is_published_by_replacing_a_link(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters()
    for seed in (1, 2):
        adapters.write(f"version-{seed}", seed=seed)
    old, new = (adapters.wanted(f"version-{seed}") for seed in (1, 2))
    link = adapters.folder / "poet"

    async def main() -> None:
        link.symlink_to("version-1")
        assert await adapters.text("poet") == old
        (adapters.folder / ".poet").symlink_to("version-2")
        (adapters.folder / ".poet").replace(link)
        await asyncio.sleep(LISTING_TTL_SECONDS)
        assert await adapters.text("poet") == new != old

    run(main)


def test_old_version_answers_while_a_new_one_takes_too_long_to_load(
    make_adapters: MakeAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = make_adapters()
    adapters.write("poet", seed=1)
    old = adapters.wanted("poet")
    is_readable = threading.Event()
    fetch = AdapterRegistry.fetch

    def fetch_later(registry: AdapterRegistry, listed: RegisteredAdapter) -> Any:  # noqa: ANN401
        is_readable.wait(60)
        return fetch(registry, listed)

    async def main() -> None:
        assert await adapters.text("poet") == old
        monkeypatch.setattr(AdapterRegistry, "fetch", fetch_later)
        monkeypatch.setattr(pool, "NEW_VERSION_SECONDS", 0.2)
        adapters.write("poet", seed=2)
        await asyncio.sleep(LISTING_TTL_SECONDS)
        assert await adapters.text("poet") == old
        is_readable.set()
        await adapters.wait_for("poet", adapters.wanted("poet"))

    run(main)


def test_adapter_used_longest_ago_leaves_for_another_but_none_in_use(
    make_adapters: MakeAdapters,
) -> None:
    adapters = make_adapters(max_adapters=2)
    for seed, name in enumerate(("a", "b", "c")):
        adapters.write(name, seed=seed)

    async def main() -> None:
        wanted = {name: adapters.wanted(name) for name in ("a", "b", "c")}
        for name, there in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            assert await adapters.text(name) == wanted[name]
            assert adapters.pool.loaded_names == set(there)
        held = [await adapters.pool.respond(asked(f"tiny:{name}")) for name in ("b", "c")]
        with pytest.raises(BusyError, match="all 2 adapters"):
            await adapters.text("a")
        assert await adapters.text("b") == wanted["b"]
        assert await adapters.text(None) == adapters.wanted(None)
        await held[0].aclose()
        assert await adapters.text("a") == wanted["a"]
        await held[1].aclose()

    run(main)


def test_adapter_of_a_stream_closed_unread_is_released(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters(max_adapters=1)
    for seed, name in enumerate(("a", "b")):
        adapters.write(name, seed=seed)

    async def main() -> None:
        stream = await adapters.pool.respond(asked("tiny:a"))
        with pytest.raises(BusyError, match="all 1 adapters"):
            await adapters.text("b")
        await stream.aclose()
        assert await adapters.text("b") == adapters.wanted("b")

    run(main)


def test_adapter_of_an_invalid_request_is_released(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters(max_adapters=1)
    for seed, name in enumerate(("a", "b")):
        adapters.write(name, seed=seed)

    async def main() -> None:
        with pytest.raises(InvalidRequestError, match="is 128 tokens"):
            await adapters.pool.respond(asked("tiny:a", "fox " * 200))
        assert await adapters.text("b") == adapters.wanted("b")

    run(main)


def test_old_version_is_dropped_when_its_last_stream_is_closed_unread(
    make_adapters: MakeAdapters, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raytune_llama.serve.adapters.pool")
    adapters = make_adapters()
    adapters.write("poet", seed=1)

    def num_dropped() -> int:
        return sum(message.endswith(": dropped") for message in caplog.messages)

    async def main() -> None:
        stream = await adapters.pool.respond(asked("tiny:poet"))
        adapters.write("poet", seed=2)
        await adapters.wait_for("poet", adapters.wanted("poet"))
        assert num_dropped() == 0
        await stream.aclose()
        assert num_dropped() == 1

    run(main)


def test_model_is_as_it_was_when_all_adapters_have_left(make_adapters: MakeAdapters) -> None:
    adapters = make_adapters()
    adapters.write("a", seed=0)
    model = adapters.served.model
    before = {name: type(module) for name, module in model.named_modules()}

    async def main() -> None:
        await adapters.text("a")
        assert before != {name: type(module) for name, module in model.named_modules()}
        shutil.rmtree(adapters.folder / "a")
        async with asyncio.timeout(60):
            while True:
                try:
                    await adapters.text("a")
                except UnknownModelError:
                    break
        await adapters.text(None)

    run(main)
    assert before == {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "name", ["none", "../x", "a/b", ".", "..", "", "a" * 500, "a\x00", "A", ".hidden", "a:b", "*"]
)
def test_name_that_is_not_listed_is_unknown(make_adapters: MakeAdapters, name: str) -> None:
    adapters = make_adapters()
    adapters.write("a", seed=0)
    shutil.copytree(adapters.folder / "a", adapters.folder.parent / "x")
    shutil.copytree(adapters.folder / "a", adapters.folder / ".hidden")
    shutil.copytree(adapters.folder / "a", adapters.folder / "a" / "b")
    with pytest.raises(UnknownModelError, match=r"Available models: `tiny`, `tiny:a`$"):
        run(lambda: adapters.text(name))


def flip_bit(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    (folder / OUTPUT_MANIFEST).unlink()


def change_manifest(folder: Path, **values: Any) -> None:  # noqa: ANN401
    write_json_atomic(folder / OUTPUT_MANIFEST, read_json(folder / OUTPUT_MANIFEST) | values)


def name_other_base(folder: Path) -> None:
    change_manifest(folder, base={"model.safetensors": "0" * 64})


def name_other_tokenizer(folder: Path) -> None:
    change_manifest(folder, tokenizer_hash="blake3:" + "0" * 64)


def name_other_template(folder: Path) -> None:
    change_manifest(folder, chat={"template": "alpaca", "template_hash": "blake3:" + "0" * 64})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (flip_bit, "adapter_model.safetensors differs from its manifest"),
        (cut, "is truncated inside its header"),
        (
            name_other_base,
            "not the base that bad was trained on: it has another model.safe",
        ),
        (name_other_tokenizer, "tokenizer in .* does not match its manifest"),
        (name_other_template, "is not what .* was tuned with"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_and_all_else_goes_on(
    make_adapters: MakeAdapters, spoil: Callable[[Path], None], problem: str
) -> None:
    adapters = make_adapters()
    adapters.write("good", seed=0)
    spoil(adapters.write("bad", seed=1))

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=problem) as caught:
                await adapters.text("bad")
            for path in (adapters.folder, adapters.base):
                assert str(path) not in str(caught.value)
        assert await adapters.text(None) == adapters.wanted(None)
        assert await adapters.text("good") == adapters.wanted("good")
        # Repaired, it is taken.
        adapters.write("bad", seed=2)
        wanted = adapters.wanted("bad")
        async with asyncio.timeout(60):
            while await text_or_none() != wanted:
                await asyncio.sleep(0.05)

    async def text_or_none() -> str | None:
        with suppress(InvalidRequestError):
            return await adapters.text("bad")
        return None

    run(main)


def test_new_version_that_is_damaged_leaves_the_old_one_in_use(
    make_adapters: MakeAdapters, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = make_adapters()
    adapters.write("poet", seed=1)
    old = adapters.wanted("poet")

    async def main() -> None:
        assert await adapters.text("poet") == old
        flip_bit(adapters.write("poet", seed=2))
        async with asyncio.timeout(60):
            while "the old one stays in use" not in caplog.text:
                assert await adapters.text("poet") == old
                await asyncio.sleep(0.02)
        assert await adapters.text("poet") == old

    run(main)


def test_adapters_in_object_storage_are_served_and_swapped(
    make_adapters: MakeAdapters, s3_path: Place
) -> None:
    adapters = make_adapters(place=s3_path)

    def publish(seed: int) -> str:
        for file in adapters.write("poet", seed=seed).iterdir():
            (s3_path / "poet" / file.name).upload(file)
        return adapters.wanted("poet")

    async def main() -> None:
        old = await asyncio.to_thread(publish, 1)
        assert await adapters.text("poet") == old
        new = await asyncio.to_thread(publish, 2)
        assert new != old
        await adapters.wait_for("poet", new)
        with pytest.raises(UnknownModelError, match="Available models: `tiny`, `tiny:poet`"):
            await adapters.text("../poet")

    run(main)
