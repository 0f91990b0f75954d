"""report.html in a browser: tables, samples, two results, replay, keys, widths."""

import base64
import json
import random
import re
import zlib

import pytest
from browser import Browser
from crafted import craft, save

from experiment.result import VOLATILE
from reporting.data import read_all
from reporting.page import page
from reporting.plots import Picture
from reporting.samples import pack, relative
from scripts import report
from utils import atomic_write_json, sha256

FIRST = [1.0, 1.0, 0.0, 0.0] * 10
SECOND = [1.0, 0.0, 1.0, 0.0] * 10
# an answer whose tokens give its text, which a stop string cut; "é" is two units of UTF-8, the clef
# two of UTF-16
TOKENS = {"7": "Hi", "8": " <b>", "9": "é𝄞", "10": "\n", "11": "Q:", "2": "<|end|>"}
ANSWER = {
    "token_ids": [7, 8, 9, 10, 11, 2, 2, 0],
    "committed_at": [3, 0, 1, 2, 4, 5, 5, -1],
    "nfe": 6,
    "tokens_returned": 4,
    "raw_text": "Hi <b>é𝄞\nQ:<|end|>",
    "text": "Hi <b>é𝄞\n",
    "cut": "end token 2",
    "verdict": {"passed": True, "strict": {"passed": False}},
}
LIKELIHOOD = {
    "doc_id": 0,
    "repeat": 0,
    "prompt": "Water is",
    "target": 1,
    "metrics": {"acc,none": 1.0},
    "text": " wet",
    "token_ids": [],
    "committed_at": [],
    "nfe": 256,
    "options": [
        {"continuation": " dry", "key": "a", "loglikelihood": -9.25},
        {"continuation": " wet", "key": "b", "loglikelihood": -0.5},
    ],
    "chosen": 1,
}


def sign(path, result) -> None:
    covered = {name: value for name, value in result.items() if name not in VOLATILE}
    atomic_write_json(path, result | {"content_sha256": sha256(covered)})


def change(path, **changes) -> None:
    sign(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Address of a report; in its index: 0 dream, 1 and 2 llada with K 1 and 2, then others."""
    folder, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("report")
    save(folder, "dream", k=1, right=0.7)
    path = save(folder, "llada", k=1, scores=FIRST)
    result = json.loads(path.read_text())
    result["samples"][5] |= ANSWER
    sign(path, result | {"token_texts": result["token_texts"] | TOKENS})
    save(folder, "llada", k=2, scores=SECOND)
    for seed in (0, 1):
        save(folder, "llada", "humaneval", 1, right=0.4, n=12, seed=seed)
    old = save(folder, "dream", "mbpp", 3, right=0.3, n=230, data="mini", limit=230)
    change(old, token_texts={})
    path = save(folder, "llada", "truthfulqa", 1, n=1, predictions="abc", tag="likelihood")
    summary = {"value": 1.0, "stderr": 0.1, "ci95": [0.5, 1.0], "n": 1}
    change(
        path,
        samples=[LIKELIHOOD],
        headline={"metric": "acc,none", **summary},
        metrics={"acc,none": summary},
    )
    assert report.main([str(folder), "--out", str(out)]) == 0
    return (out / "report.html").as_uri()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def show(tab, address, fragment="", **size) -> None:
    tab.open(address + fragment, **size)
    tab.wait("!$('count').textContent.includes('unpacking')")


def index_of(tab, name: str) -> int:
    return tab.run(f"INDEX.results.findIndex(r => r.name.startsWith({name!r}))")


def column(tab, table: int, name: str) -> list[str]:
    """The visible cells of a column of the page's nth table."""
    return tab.run(
        "(s => { const heads = [...s.querySelectorAll('th')].map(h => h.textContent);"
        "const rows = [...s.querySelectorAll('tbody tr:not([hidden])')];"
        f"return rows.map(r => r.cells[heads.indexOf({name!r})].textContent) }})"
        f"(document.querySelectorAll('section.table')[{table}])"
    )


def texts(tab, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


# ---------------------------------------------------------------- packed samples


def unpacked(result, metric="exact_match,flexible-extract") -> list:
    lines = pack(result, metric).split("\n")
    return [json.loads(zlib.decompress(base64.b64decode(line))) for line in lines]


def test_a_text_that_its_tokens_give_is_not_stored_twice():
    result, _ = craft(n=4)
    result["samples"][1] |= ANSWER
    result["token_texts"] |= TOKENS
    _, packed = unpacked(result)
    plain, cut = packed["samples"][:2]
    assert plain["raw"] == result["samples"][0]["raw_text"]
    assert (cut["raw"], cut["text"]) == (6, 10)  # tokens; units of UTF-16
    assert [packed["tokens"][i][0] for i in cut["ids"]] == [7, 8, 9, 10, 11, 2, 2]
    assert (cut["starts"], cut["passes"], cut["length"]) == ([0], "3012455", 8)


def test_passes_are_relative_to_their_chunk():
    passes = [*range(31, -1, -1), 40, -1, 33]
    assert relative(passes) == ([0, 33], "".join(chr(79 - i) for i in range(32)) + "7/0")


def test_packed_samples_are_half_of_plain_ones():
    """48 results of 1,319 documents have to stay below 40 MB."""
    rng, result = random.Random(0), craft(n=1)[0]
    words = [f" w{i}" for i in range(5000)]
    result["token_texts"] = dict(enumerate(words)) | {"9999": "<|end|>"}
    result["token_texts"] = {str(token): text for token, text in result["token_texts"].items()}
    template, samples = result["samples"][0], []
    for doc in range(150):
        ids = [min(int(rng.paretovariate(0.7)), 4999) for _ in range(120)]
        text = "".join(words[i] for i in ids)
        order = sorted(range(128), key=lambda p: p // 32 * 32 + rng.random())
        at = [order.index(p) for p in range(128)] + [-1] * 128
        changes = {"token_ids": ids + [9999] * 136, "committed_at": at, "nfe": 128}
        changes |= {"doc_id": doc, "text": text, "raw_text": text + "<|end|>"}
        samples.append(template | changes)
    result["samples"] = samples
    plain = len(base64.b64encode(zlib.compress(json.dumps(samples).encode(), 6)))
    assert len(pack(result, "exact_match,flexible-extract")) < 0.55 * plain


def test_about_a_result_has_what_made_it_and_no_empty_settings():
    about, _ = unpacked(craft(k=2)[0])
    origin, configuration = about["Origin"], about["Configuration"]
    assert origin["commit"] == "c0ffee" + 34 * "0" and origin["machine"] == "NVIDIA H200"
    assert origin["started"] == "2026-01-01T00:00:00+00:00" and "system" not in configuration
    assert about["Departs from the protocol in"] == {"tokens_per_step": "2 (protocol: 1)"}


# ---------------------------------------------------------------- tables


def test_the_first_figure_is_of_the_protocol_of_most_results(tmp_path):
    for k, protocol in ((1, "official"), (1, "uniform"), (2, "uniform")):
        save(tmp_path, k=k, n=3, protocol=protocol)
    names = ("accuracy_tpf_official", "accuracy_k_uniform", "accuracy_tpf_uniform")
    pictures = [Picture(name, f"title of {name}", "<svg></svg>") for name in names]
    text = "".join(page(read_all([tmp_path])[0], [], pictures, {}, False))
    first, folded = text.split("<summary>2 more figures</summary>")
    assert [name in first for name in names] == [False, False, True]
    assert [name in folded for name in names] == [True, True, False]


@pytest.mark.slow
def test_it_opens_on_accuracy_against_speed(tab, pages):
    show(tab, pages)
    assert texts(tab, "#overview > h1") == ["Accuracy against speed"]
    assert tab.run("document.querySelector('figure').getBoundingClientRect().top") < 150
    assert texts(tab, "figcaption")[0].startswith("Accuracy against tokens per forward pass")
    assert tab.run("$('view').hidden && !$('overview').hidden")


@pytest.mark.slow
def test_verdict_columns_are_first(tab, pages):
    show(tab, pages)
    heads = texts(tab, "section.table:nth-of-type(2) th")
    assert heads[:3] == ["verdict", "B - A [95 %]", "p"] and "A" in heads[3:]


@pytest.mark.slow
def test_a_heading_sorts_its_column(tab, pages):
    show(tab, pages)
    head = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'tok/s')"
    tab.click(head)
    up = column(tab, 0, "tok/s")
    assert up[-1] == "-" and [float(x) for x in up[:-1]] == sorted(float(x) for x in up[:-1])
    tab.click(head)
    down = column(tab, 0, "tok/s")
    assert down == [*up[-2::-1], "-"] and up[0] != up[-2]
    assert tab.run(f"{head}.closest('th').ariaSort") == "descending"


@pytest.mark.slow
def test_a_filter_leaves_the_rows_with_all_words(tab, pages):
    show(tab, pages)
    tab.run("document.querySelector('section.table input').focus()")
    tab.call("Input.insertText", text="LLADA gsm8k")
    assert column(tab, 0, "model") == ["llada", "llada"] and column(tab, 0, "K") == ["1", "2"]
    assert texts(tab, ".count")[0] == "2 of 6 rows"


# ---------------------------------------------------------------- samples


@pytest.mark.slow
def test_a_click_on_a_row_opens_its_samples(tab, pages):
    show(tab, pages)
    tab.click("document.querySelector('section.table tbody tr').cells[3]")
    tab.wait("$('count').textContent === '40 of 40 samples'")
    assert texts(tab, "#title") == ["dream gsm8k, uniform, maskgit_plus, K = 1"]
    tab.click("$('list').children[2]")
    assert tab.run("location.hash") == "#result=0&doc=2" and texts(tab, "h2")[
        -1
    ] == "Document 2 " + (tab.run("$('list').children[2].querySelector('.mark').textContent"))
    tab.click("$('back')")
    tab.wait("$('view').hidden")


@pytest.mark.slow
def test_the_address_opens_a_sample(tab, pages):
    show(tab, pages)
    i = index_of(tab, "dream mbpp")
    show(tab, pages, f"#result={i}&doc=205")
    assert texts(tab, "[aria-current] .doc") == ["205"]
    assert tab.run("$('list').querySelector('[aria-current]').getBoundingClientRect().bottom") < 900
    (prompt,) = texts(tab, "pre.prompt")  # text of a sample is text, not HTML
    assert prompt == "<|user|>Question 205?\n</script>" and not texts(tab, "#sample b")
    assert "Answer to 205: <b>" in texts(tab, "#sample pre")[1]
    assert len(texts(tab, ".strip i")) == 512 and texts(tab, ".canvas") == []
    title = tab.run("document.querySelector('.strip i').title")  # the text is not known
    assert re.fullmatch(r"position 0: token \d+, forward pass \d+ of 171", title)


@pytest.mark.slow
def test_a_number_opens_a_document_and_words_filter(tab, pages):
    show(tab, pages, "#result=1")
    tab.run("$('number').value = 7, $('number').dispatchEvent(new Event('change'))")
    assert texts(tab, "[aria-current] .doc") == ["7"]
    assert texts(tab, ".beside pre")[1] == "score 0\nextracted by flexible-extract: 7"
    tab.run("$('number').value = 40, $('number').dispatchEvent(new Event('change'))")
    assert texts(tab, "#count") == ["no document 40"]
    tab.run("$('words').focus()")
    tab.call("Input.insertText", text="question 3")
    assert texts(tab, "#list .doc") == ["3", *map(str, range(30, 40))]


@pytest.mark.slow
def test_the_target_is_beside_the_answer(tab, pages):
    top = "[...document.querySelectorAll('.beside > div')].slice(0, 2)"
    top += ".map(e => e.getBoundingClientRect())"
    show(tab, pages, "#result=1&doc=2")
    assert "target 2" in texts(tab, ".beside pre")
    a, b = tab.run(f"{top}.map(r => [r.top, r.left])")
    assert a[0] == b[0] and a[1] < b[1]
    show(tab, pages, "#result=1&doc=2", width=400)
    a, b = tab.run(f"{top}.map(r => [r.top, r.left])")
    assert a[0] < b[0] and a[1] == b[1]


@pytest.mark.slow
def test_a_result_says_where_it_is_from(tab, pages):
    show(tab, pages, "#result=2")
    (line,) = texts(tab, "#about summary")
    assert "exact_match 50.0 [35.2, 64.8] %" in line and "2026-01-01 00:00:00 UTC" in line
    assert "commit c0ffee0000" in line and "NVIDIA H200" in line
    tab.click("document.querySelector('#about summary')")
    shown = dict(zip(texts(tab, "#about dt"), texts(tab, "#about dd"), strict=True))
    assert shown["algorithm"] == "low_confidence" and shown["gen_length"] == "256"


@pytest.mark.slow
def test_a_likelihood_result_is_shown(tab, pages):
    """Its samples have options in place of tokens."""
    show(tab, pages)
    show(tab, pages, f"#result={index_of(tab, 'llada truthfulqa')}")
    assert texts(tab, "#sample h3") == "Prompt Answer Verdict options chosen Target".split()
    assert texts(tab, ".beside th") == ["", "continuation", "loglikelihood"]
    assert texts(tab, ".chosen td") == ["1", " wet", "-0.5"] and texts(tab, ".strip") == []


@pytest.mark.slow
def test_samples_can_be_left_out(tab, tmp_path):
    save(tmp_path / "results", n=3)
    words = [str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--no_samples"]
    assert report.main(words) == 0
    show(tab, (tmp_path / "out" / "report.html").as_uri(), "#result=0")
    assert texts(tab, "#count") == ["The samples were left out (--no_samples)."]
    assert "commit c0ffee0000" in texts(tab, "#about summary")[0]


# ---------------------------------------------------------------- two results


@pytest.mark.slow
def test_two_results_are_side_by_side(tab, pages):
    show(tab, pages, "#result=1&with=2")
    shown = {}
    for name in ("better", "worse", "both", "neither", "differ"):
        tab.run(f"$('show').value = {name!r}, $('show').dispatchEvent(new Event('change'))")
        shown[name] = [int(doc) % 4 for doc in texts(tab, "#list .doc")]
    assert shown == {
        "better": [1] * 10,
        "worse": [2] * 10,
        "both": [0] * 10,
        "neither": [3] * 10,
        "differ": [1, 2] * 10,
    }
    labels = texts(tab, "#show option")
    assert "right here, wrong there" in labels and "wrong here, right there" in labels
    assert texts(tab, "#sample h2 .mark") == ["✓", "✗"]
    assert {"Answer A", "Answer B", "Target"} <= {*texts(tab, "#sample h3")}


@pytest.mark.slow
def test_only_results_on_the_same_documents_are_offered(tab, pages):
    show(tab, pages, "#result=1")
    assert [name[:11] for name in texts(tab, "#with option")] == [
        "no other re",
        "dream gsm8k",
        "llada gsm8k",
    ]
    tab.run("$('with').value = '0', $('with').dispatchEvent(new Event('change'))")
    tab.wait(
        "document.querySelectorAll('#title').length && $('title').textContent.includes('B: dream')"
    )


@pytest.mark.slow
def test_a_comparison_opens_the_documents_that_differ(tab, pages):
    show(tab, pages)
    tab.click("document.querySelectorAll('section.table')[1].querySelector('tbody a')")
    tab.wait("$('count').textContent === '20 of 40 samples'")
    assert tab.run("location.hash").startswith("#result=1&with=2&show=differ")


# ---------------------------------------------------------------- replay


def pass_shown(tab) -> str:
    (text,) = texts(tab, "output")
    return text


@pytest.mark.slow
def test_the_canvas_is_replayed_pass_by_pass(tab, pages):
    show(tab, pages, "#result=1&doc=5")
    answer, scored = texts(tab, ".beside pre")[0], "Hi <b>é𝄞\n"
    assert answer == scored + "Q:<|end|>" and texts(tab, "pre .rest") == ["Q:<|end|>"]
    assert '5: "<|end|>", token 2, forward pass 6 of 6' in tab.run(
        "document.querySelectorAll('.strip i')[5].title"
    )
    assert (
        tab.run("document.querySelectorAll('.strip i')[7].title") == "position 7: never committed"
    )
    assert pass_shown(tab) == "pass 6 of 6, 7 tokens"
    tab.run("document.querySelector('.slider').focus()")
    tab.press("Home")
    assert texts(tab, ".canvas span:not(.open)") == [] and pass_shown(tab).startswith("pass 0")
    for shown in ([" <b>"], [" <b>", "é𝄞"], [" <b>", "é𝄞", "\n"], ["Hi", " <b>", "é𝄞", "\n"]):
        tab.press("ArrowRight")
        assert texts(tab, ".canvas span:not(.open)") == shown
    assert texts(tab, ".canvas .new") == ["Hi"] and len(texts(tab, ".strip i:not(.open)")) == 4
    tab.click("document.querySelectorAll('.strip i')[2]")  # to the pass of that cell
    assert pass_shown(tab) == "pass 2 of 6, 2 tokens"
    tab.click("[...document.querySelectorAll('button')].find(b => b.textContent === 'replay')")
    tab.wait("document.querySelector('output').textContent.startsWith('pass 6')")


@pytest.mark.slow
def test_a_cell_and_its_token_are_marked_together(tab, pages):
    show(tab, pages, "#result=1&doc=5")
    x, y = tab.run(
        "(r => [r.x + 5, r.y + 5])(document.querySelector('.strip i').getBoundingClientRect())"
    )
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait("document.querySelectorAll('.hot').length === 2")
    assert texts(tab, ".canvas .hot") == ["Hi"]


# ---------------------------------------------------------------- keys, widths, colours


@pytest.mark.slow
def test_all_is_reached_with_keys(tab, pages):
    focus = "document.activeElement"
    show(tab, pages)
    for _ in range(40):
        tab.press("Tab")
        if tab.run(f"{focus}.matches('tbody a')"):
            break
    assert tab.run(f"{focus}.closest('tr').rowIndex") == 1
    assert tab.run(f"getComputedStyle({focus}).outlineStyle") == "solid"
    tab.press("ArrowDown", "Enter")
    tab.wait("$('count').textContent === '40 of 40 samples'")
    assert texts(tab, "#title")[0].startswith("llada gsm8k") and tab.run(f"{focus}.id") == "title"
    for _ in range(12):
        tab.press("Tab")
        if tab.run(f"{focus}.matches('#list button')"):
            break
    tab.press("ArrowDown", "ArrowDown")
    assert texts(tab, "[aria-current] .doc") == ["2"] and tab.run("location.hash").endswith("doc=2")
    assert tab.run(f"getComputedStyle({focus}).outlineStyle") == "solid"
    tab.press("Enter")
    assert tab.run(f"{focus}.id") == "sample"
    tab.press("Escape")
    assert tab.run(f"{focus}.matches('[aria-current]')") and not tab.run("$('view').hidden")
    tab.press("Escape")
    tab.wait("$('view').hidden")
    assert tab.run(f"{focus}.closest('tr').rowIndex") == 2  # where it was left


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 800, 1280, 1600])
def test_it_fits_the_window(tab, pages, width):
    for fragment in ("", "#result=1&doc=5", "#result=1&with=2&doc=5"):
        show(tab, pages, fragment, width=width)
        tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.run("document.documentElement.scrollWidth") <= width, fragment
        if width >= 1280 and not fragment:
            tables = "[...document.querySelectorAll('.wide')]"
            assert tab.run(f"{tables}.every(t => t.scrollWidth <= t.clientWidth)")


@pytest.mark.slow
def test_dark_mode_has_light_text_on_a_dark_page(tab, pages):
    def colours(dark):
        show(tab, pages, dark=dark)
        style = "getComputedStyle(document.body)"
        found = [
            tab.run(f"{style}.{name}.match(/\\d+/g).map(Number)")
            for name in ("backgroundColor", "color")
        ]
        return [max(rgb) for rgb in found], len(tab.picture())

    (paper, ink), size = colours(dark=False)
    (dark_paper, light_ink), dark_size = colours(dark=True)
    assert paper > 240 and ink < 60 and dark_paper < 60 and light_ink > 200
    assert min(size, dark_size) > 20_000  # a blank picture is a few kB
