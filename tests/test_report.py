"""Run pages: what they say, that nothing in a corpus breaks them, and how a real browser sees them.

The browser is Chromium, driven by selenium; where it is not installed those tests are skipped.
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

from tests import reference as ref
from tests.parity.models import FULL, MODERN, TINY, build
from tests.reference import models
from tests.reference.attention import attention_weights, place, split_heads
from tests.test_train import SMALL, TINY_GPT, command, fails, interrupt, run
from tests.text import SONNETS
from tinygpt import GPT, BigramLanguageModel, CharTokenizer, GPTConfig, InputError
from tinygpt.checkpoint import (
    ALL_FILES,
    append_sample,
    read_samples,
)
from tinygpt.report import (
    attention_content,
    attention_maps,
    next_token_logits,
    page,
    passage_content,
)

# What a page must show as text and never run: ends of elements, comments, entities, text that runs
# to the left, a mark that reverses what follows, controls, a character beyond 16 bits.
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)><!-- &lt;b&gt; "
    '"\\u003c" \u2028 שלום عربي \u202e reversed \x00\x07\x1b[31m 🙂 {{data}} {{title}} ]]>\r\n\t\n'
)

GPT_RUN = f"--preset micro {SMALL} {TINY_GPT} --n-layer 2 --n-head 2 --max-iters 120"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and three runs: a GPT, a bigram model, and one that reads HOSTILE."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text(SONNETS)
    (folder / "hostile.txt").write_text(HOSTILE * 40, newline="")
    for name, flags in {
        "gpt": f"--data text.txt {GPT_RUN}",
        "bigram": f"--data text.txt --preset bigram {SMALL} --max-iters 60",
        "hostile": f"--data hostile.txt {GPT_RUN}",
    }.items():
        result = run(folder, "train", f"{flags} --out-dir runs/{name}")
        assert result.returncode == 0, result.stderr
        assert "could not" not in result.stderr
        assert "report.html in it shows it" in result.stdout
    return folder


def content(path: Path) -> Any:
    """The data in a page, found as a browser finds it: up to the first end of its element."""
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)
    assert found
    return json.loads(found[1])


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, FULL, MODERN])
def test_attention_maps_are_the_references(config: GPTConfig) -> None:
    model, p = build(config)
    idx = np.array([[3, 1, 4, 1]])
    maps = attention_maps(model, Tensor(idx.astype(np.int32)))
    assert maps.shape == (2, 2, 4, 4) and maps.dtype == np.float32
    modern = config.qk_norm, config.position == "rotary"
    stream = models._residual_stream(p, idx, 2, config.activation, {}, config.qk_norm)
    for i, (layer, x) in enumerate(zip(maps, stream, strict=False)):
        inside = {n.removeprefix(f"h.{i}."): a for n, a in p.items() if n.startswith(f"h.{i}.")}
        normed = models._norm(x, inside, "ln_1")
        qkv = ref.linear(normed, inside["attn.c_attn.weight"], inside.get("attn.c_attn.bias"))
        q, k, _ = (place(split_heads(part, 2), *modern) for part in np.split(qkv, 3, axis=-1))
        # float32 through two layers of a model whose values are near 1, against float64
        np.testing.assert_allclose(layer, attention_weights(q, k)[0], atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)  # a sum of four roundings
    assert (np.triu(maps, 1) == 0).all()


def test_attention_maps_say_what_is_wrong() -> None:
    model = GPT(TINY)
    with pytest.raises(InputError, match="block_size is 4"):
        attention_maps(model, Tensor([[0] * 5]))
    with pytest.raises(InputError, match="2 rows"):
        attention_maps(model, Tensor([[0], [1]]))
    with pytest.raises(InputError, match="token 7"):
        attention_maps(model, Tensor([[7]]))


def test_every_token_is_read_with_half_a_block_before_it() -> None:
    model, _ = build(GPTConfig(block_size=6, vocab_size=7, n_layer=1, n_head=2, n_embd=4))
    ids = np.random.default_rng(0).integers(0, 7, 20).astype(np.int32)
    logits = next_token_logits(model, ids)
    assert logits.shape == (19, 7)
    for i in range(19):
        contexts = range(min(i + 1, 3), min(i + 1, 6) + 1)
        alone = [model(Tensor(ids[None, i + 1 - n : i + 1]))[0].numpy()[0, -1] for n in contexts]
        # float32, the same operations in another shape
        assert any(np.allclose(logits[i], a, atol=1e-5) for a in alone), i


def test_surprise_is_the_models_loss() -> None:
    tokenizer = CharTokenizer.from_text(SONNETS)
    model = BigramLanguageModel(tokenizer.vocab_size)
    ids = tokenizer.encode_array(SONNETS)[:50]
    passage = passage_content(model, tokenizer, ids)
    loss = model(Tensor(ids[None, :-1]), Tensor(ids[None, 1:]))[1]
    assert loss is not None
    # bits are kept to three digits after the point
    assert np.mean(passage["bits"]) * np.log(2) == pytest.approx(loss.item(), abs=1e-3)
    assert "".join(passage["text"][i] for i in passage["ids"]) == SONNETS[:50]
    chances = np.array(passage["chances"])
    assert (np.diff(chances) <= 0).all() and (chances > 0).all() and (chances.sum(-1) <= 1.01).all()


def test_large_models_are_shown_in_part() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=7, n_layer=13, n_head=16, n_embd=16))
    shown = attention_content(model, np.zeros(8, np.int32))
    assert shown["of"] == (13, 16) and len(shown["layers"]) == len(shown["heads"]) == 12
    assert shown["layers"][0] == 0 and shown["layers"][-1] == 12 and shown["heads"][-1] == 15


# Pages --------------------------------------------------------------------------------------------


def test_what_a_page_holds(folder: Path) -> None:
    path = folder / "runs/gpt/report.html"
    data = content(path)
    (run_data,) = data["runs"]
    assert run_data["rows"]["iteration"] == [1, *range(10, 121, 10)]
    assert [sample["iteration"] for sample in run_data["samples"]] == [40, 80, 120]
    settings = {row["name"]: row for row in run_data["config"]}
    assert settings["n_layer"]["value"] == "2" and settings["n_layer"]["preset"] == "4"
    assert settings["beta1"]["preset"] is None and settings["min_lr"]["value"] == "0.0001"
    summary = json.loads((path.parent / "summary.json").read_text())
    assert run_data["summary"]["val_loss"] == summary["val_loss"]
    val = SONNETS[int(0.9 * len(SONNETS)) :]
    passage = data["passage"]
    assert "".join(passage["text"][str(i)] for i in passage["ids"]) == val[:400]
    assert data["attention"]["of"] == [2, 2] and data["attention"]["tokens"] == 8
    assert path.stat().st_size < 1_000_000
    assert "attention" not in content(folder / "runs/bigram/report.html")


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    path = folder / "runs/gpt/report.html"
    before = hashlib.sha256(path.read_bytes()).digest()
    result = run(folder, "report", "runs/gpt")
    assert result.returncode == 0 and result.stdout == "runs/gpt/report.html\n", result.stderr
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_a_sample_at_every_evaluation_is_what_the_weights_write(folder: Path) -> None:
    """The last one, at least: sample.txt is drawn from the same weights and begins with it."""
    for name in ("gpt", "bigram"):
        samples = read_samples(folder / "runs" / name)
        texts = [sample["text"] for sample in samples]
        assert len(set(texts)) == len(texts)  # the weights differ, the decoder sees the new ones
        assert (folder / "runs" / name / "sample.txt").read_text().startswith(texts[-1])
        assert all(len(text) == 100 for text in texts)


def test_samples_survive_kill_and_resume(folder: Path) -> None:
    flags = f"--data text.txt {GPT_RUN} --out-dir runs/killed"
    interrupt(folder, flags, 9, '"iteration": 90,')
    (folder / "runs/killed/samples.jsonl").write_text(  # as if killed between sample and checkpoint
        (folder / "runs/killed/samples.jsonl").read_text()
        + '{"iteration": 120, "text": "never was"}\n'
    )
    assert run(folder, "train", "--resume --out-dir runs/killed").returncode == 0
    assert read_samples(folder / "runs/killed") == read_samples(folder / "runs/gpt")


def test_a_run_without_data_or_weights_or_evaluations(folder: Path, tmp_path: Path) -> None:
    for name in ("gpt", "bigram"):
        shutil.copytree(folder / "runs" / name, tmp_path / name)  # where there is no text.txt
    result = run(tmp_path, "report", "gpt")
    assert result.returncode == 0, result.stderr
    data = content(tmp_path / "gpt/report.html")
    assert "no file text.txt" in data["note"] and "passage" not in data
    # as a run that was killed before its first evaluation
    bare = tmp_path / "bigram"
    for name in set(ALL_FILES) - {"config.json", "tokenizer.json", "metrics.jsonl"}:
        (bare / name).unlink(missing_ok=True)
    (bare / "metrics.jsonl").write_text(
        (bare / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    )
    result = run(tmp_path, "report", "bigram")
    assert result.returncode == 0, result.stderr
    assert "no weights" in content(bare / "report.html")["note"]


def test_comparison(folder: Path) -> None:
    result = run(folder, "report", "runs/gpt runs/bigram")
    assert result.returncode == 0 and result.stdout == "comparison.html\n", result.stderr
    data = content(folder / "comparison.html")
    assert [one["name"] for one in data["runs"]] == ["gpt", "bigram"]
    assert run(folder, "report", "runs/gpt runs/gpt --output two.html").stdout == "two.html\n"
    assert (folder / "two.html").exists()


def test_report_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    fails(run(folder, "report", "runs/none"), "holds no run")
    fails(run(tmp_path, "report", ""), "train one with")
    fails(run(folder, "report", "runs/gpt --output none/page.html"), "cannot write none/page.html")
    for name, damage, message in (
        ("metrics.jsonl", "", "no metrics yet"),
        ("metrics.jsonl", "{\n{}\n{}\n", "line 1 is not JSON"),
        ("metrics.jsonl", "7\n", "line 1 is not a row"),
        ("metrics.jsonl", '{"iteration": NaN}\n', "line 1 is not a row"),
        ("samples.jsonl", '{"iteration": 1}\n', "samples.jsonl is damaged"),
        ("summary.json", "[]", "summary.json is damaged"),
        ("best.safetensors", "x" * 100, "best.safetensors is damaged"),
        ("config.json", "{}", "not the configuration"),
    ):
        broken = folder / "runs/broken"
        shutil.copytree(folder / "runs/gpt", broken, dirs_exist_ok=True)
        (broken / name).write_text(damage)
        page_before = (broken / "report.html").read_bytes()
        fails(run(folder, "report", "runs/broken"), message)
        assert (broken / "report.html").read_bytes() == page_before
        shutil.rmtree(broken)


def test_a_page_that_cannot_be_written_does_not_fail_the_run(folder: Path) -> None:
    out = folder / "runs/blocked"
    flags = f"--data text.txt --preset bigram {SMALL} --max-iters 40 --out-dir runs/blocked"
    # the name is taken by a folder from the first row on: a rename over it fails
    process = subprocess.Popen(
        command("train", f"{flags} --max-iters 3000"), cwd=folder, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
    (out / "report.html").mkdir()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and (out / "summary.json").exists()
    assert "report.html" in errors and "Traceback" not in errors


def test_nothing_in_a_text_ends_the_data(folder: Path) -> None:
    text = (folder / "runs/hostile/report.html").read_text()
    assert "<img" not in text and "<script>document" not in text
    (run_data,) = content(folder / "runs/hostile/report.html")["runs"]
    assert run_data["sample"] == (folder / "runs/hostile/sample.txt").read_bytes().decode()
    hostile = page("{{data}}</title>", {"text": HOSTILE})
    assert "</title><" not in hostile.replace("</title>\n<style>", "")
    found = re.search(r'id="data">(.*?)</script', hostile, re.S)
    assert found and json.loads(found[1]) == {"text": HOSTILE}
    assert found[1].isascii()


# A browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)  # no sandbox: it cannot be had as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(programs[1])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def see(browser: Any, path: Path, width: int, scheme: str = "light") -> None:
    """Opens a page from its file; no errors, no requests, no horizontal scrolling."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    browser.get_log("performance")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert urls <= {path.as_uri()}
    sizes = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert sizes[0] <= sizes[1]


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    found: list[str] = browser.execute_script(script, selector)
    return found


def shown(browser: Any, selector: str) -> int:
    """How many elements have a size."""
    script = """return [...document.querySelectorAll(arguments[0])].filter((e) => {
        const box = e.getBoundingClientRect(); return box.width > 8 && box.height > 8; }).length"""
    found: int = browser.execute_script(script, selector)
    return found


@pytest.mark.parametrize("name", ["gpt", "bigram", "hostile"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(folder: Path, browser: Any, name: str, width: int) -> None:
    see(browser, folder / f"runs/{name}/report.html", width)
    assert browser.title == f"{name} · tinygpt"
    assert shown(browser, ".chart svg") == 3
    assert shown(browser, "canvas") == (0 if name == "bigram" else 2 * 2 + 1)
    data = content(folder / f"runs/{name}/report.html")
    assert len(texts(browser, "#surprise-text [role=option]")) == len(data["passage"]["ids"])
    samples = texts(browser, "#samples pre")
    assert samples[0] == data["runs"][0]["samples"][0]["text"]
    unnamed = """return [...document.querySelectorAll("svg, #large canvas, button, [role=listbox]")]
        .filter((e) => !e.getAttribute("aria-label")).length"""
    assert browser.execute_script(unnamed) == 0


def test_keyboard_and_pointer(folder: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    see(browser, folder / "runs/gpt/report.html", 1200)
    passage = content(folder / "runs/gpt/report.html")["passage"]
    chosen = browser.find_element("css selector", "#surprise-text [aria-selected=true]")
    chosen.send_keys(Keys.HOME)
    assert "begins the passage" in texts(browser, "#surprise-detail")[0]
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert f"{passage['bits'][0]:.2f} bits" in texts(browser, "#surprise-detail")[0]
    assert len(texts(browser, "#surprise-detail .bars dt")) in (5, 6)
    chart = browser.find_element("css selector", ".chart svg")
    chart.send_keys(Keys.HOME)
    assert "iteration 1" in texts(browser, ".legend")[0]
    browser.find_elements("css selector", ".maps button")[3].click()
    assert texts(browser, "#head-title")[0].startswith("Layer 2, head 2")
    browser.find_element("css selector", "input[value=tokens]").click()
    browser.find_element("css selector", ".chart svg").send_keys(Keys.END)
    assert "tokens 3,840" in texts(browser, ".legend")[0]  # 120 iterations of 4 rows of 8


def test_dark_is_dark(folder: Path, browser: Any) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        see(browser, folder / "runs/gpt/report.html", 800, scheme)
        script = """const pixel = document.querySelector("#large canvas").getContext("2d")
            .getImageData(0, 0, 1, 1).data;
            return [getComputedStyle(document.body).backgroundColor, [...pixel].join()]"""
        colours[scheme] = browser.execute_script(script)
    assert all(a != b for a, b in zip(colours["light"], colours["dark"], strict=True))


@pytest.mark.parametrize("width", [360, 1200])
def test_comparison_in_a_browser(folder: Path, browser: Any, width: int) -> None:
    run(folder, "report", "runs/gpt runs/bigram runs/hostile --output three.html")
    see(browser, folder / "three.html", width)
    assert shown(browser, ".chart svg") == 4
    assert len(texts(browser, "#results-table tbody tr")) == 3
    assert "n_layer22" in "".join(texts(browser, "#config tr")).replace("none", "")
    assert len(texts(browser, "#samples pre")) == 3


def test_samples_file_is_whole(tmp_path: Path) -> None:
    for i in range(3):
        append_sample(tmp_path, i, HOSTILE)
    assert read_samples(tmp_path) == [{"iteration": i, "text": HOSTILE} for i in range(3)]
