"""The page of saved results, its curves and its pictures."""

import html.parser
import itertools
import re

import pytest

from benchmarks import __main__ as cli
from benchmarks import bench_scaling, charts, curves, figures, headlines, report, saved, tables
from benchmarks.curves import OURS, ROOF
from benchmarks.saved import SavedRow


def row(workload, us=10.0, op="fp8_gemm", **changes):
    options = {"impl": "hopper", "p20": us, "p80": us, "tflops": None, "gbs": 1.0, "roof_pct": 50.0}
    return SavedRow(op=op, workload=workload, us=us, **{**options, **changes})


# ---- curves ------------------------------------------------------------------------------------------------------


def test_a_curve_is_what_differs_in_one_size():
    rows = [row(f"m{m}_n4096_k7168", us=float(m), peers={"torch": 2.0 * m}) for m in (128, 1, 64)]
    (curve,) = curves.curves([*rows, row("m1_n576_k7168"), row("m1_n4096_k7168", us=5.0, impl="triton")])
    assert (curve.op, curve.size, curve.others, curve.at) == ("fp8_gemm", "m", "n4096_k7168", (1, 64, 128))
    assert curve.lines == {ROOF: [0.5, 32, 64], "torch": [2, 128, 256], OURS: [1, 64, 128]}


def test_a_peer_may_be_missing_at_a_point():
    rows = [row(f"t{t}", peers={"torch_compile": 3.0} if t == 2 else {}) for t in (1, 2, 3)]
    (curve,) = curves.curves(rows)
    assert curve.lines["torch_compile"] == [None, 3.0, None]
    assert "torch.compile: 3.00 µs at tokens T 2" in charts.scaling(curve)


def test_h_is_heads_in_attention_and_channels_elsewhere():
    heads = [row(f"b128_s4096_q1_h{h}", op="mla_decode") for h in (16, 64, 128)]
    channels = [row(f"t1_h{h}", op="permute") for h in (16, 64, 128)]
    assert [curve.size for curve in curves.curves(heads + channels)] == ["h"]
    assert curves.sizes_of("b128_s4096_varied") == (("b", 128), ("s", 4096), ("varied", None))


def test_the_sweeps_make_a_curve_along_every_size():
    rows = [row(case.workload.name, op=case.op) for case in bench_scaling.CASES]
    along = {(curve.op, curve.size): len(curve.at) for curve in curves.curves(rows)}
    assert along == {
        ("fp8_gemm", "m"): 8,
        ("fused_experts", "e"): 6,
        ("fused_experts", "t"): 7,
        ("route", "t"): 5,
        ("mla_decode", "b"): 6,
        ("mla_decode", "s"): 6,
        ("mla_decode", "h"): 5,
        ("mla_prefill", "s"): 6,
    }


# ---- charts ------------------------------------------------------------------------------------------------------


def test_a_logarithmic_axis():
    x = charts.Axis(1, 100, 0, 200)
    assert (x(1), x(10), x(100)) == (0, 100, 200)
    assert x.ticks() == [1, 10, 100]
    assert charts.Axis(1, 40, 0, 1).ticks() == [1, 3, 10, 30]
    assert charts.Axis(9, 45, 0, 1).ticks() == [10, 20]
    assert charts.Axis(0.001, 1000, 0, 1).ticks() == [10.0**i for i in range(-3, 4)]
    assert charts.roomy((1, 2, 64, 128, 4096), charts.Axis(1, 4096, 0, 240)) == [4096, 128, 2]


def test_labels_do_not_overlap_and_keep_their_order():
    at = charts.spread({"a": 100, "b": 101, "c": 20, "d": 101}, 0, 110)
    places = sorted(at.values())
    assert sorted(at, key=at.__getitem__) == ["c", "a", "b", "d"]
    assert all(b - a >= charts.LABEL_ROOM for a, b in itertools.pairwise(places))
    assert places[-1] <= 110


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (1.234, "1.23"), (99.96, "100"), (1234.5, "1,234")])
def test_numbers_have_three_digits(value, text):
    assert charts.number(value) == text


# ---- the page ----------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """What is open, what refers to elsewhere, and how many of each."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.count, self.outside = [], {}, []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_of_what_is_saved_is_whole_and_needs_nothing_else():
    gpus = {gpu: saved.read(gpu) for gpu in saved.gpus()}
    text = report.page(gpus)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.outside == []
    assert not re.search(r"@import|url\(|https?://", text)
    rows = [row for families in gpus.values() for family in families.values() for row in family.rows]
    assert text.count('class="text">fp8_gemm<') == sum(r.op == "fp8_gemm" for r in rows) + len(gpus)
    assert not re.search(r">\s*(nan|None|inf)\b", text)
    assert reader.count["svg"] == sum(
        len(curves.curves(family.rows)) for families in gpus.values() for family in families.values()
    )
    for name in ("ours", "roof", "peer-cublaslt", "peer-torch"):
        assert f".{name}" in text


def test_writing_a_report(tmp_path, monkeypatch):
    pictures = pytest.importorskip("benchmarks.pictures")
    monkeypatch.setattr(saved, "gpus", lambda folder=saved.FOLDER: ["h200"])
    monkeypatch.setattr(pictures, "DARK", pictures.LIGHT)
    monkeypatch.setattr(pictures, "PANELS", 1)
    page, *images = report.write(tmp_path)
    assert page == tmp_path / "report.html"
    assert {image.name for image in images} == {"headlines_light.png", "peers_light.png", "scaling_light.png"}
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(saved.NotThere, match="no results in"):
        report.write(tmp_path, tmp_path / "results")


def test_eager_torch_is_a_rival_of_products_alone():
    both = {"torch": 1.0, "torch_compile": 2.0}
    assert row("m1", peers=both).rival == "torch"
    assert row("m1", peers=both).label("torch") == "torch bf16"
    assert row("m1", op="quantize", peers=both).rival == "torch_compile"
    assert row("m1", op="quantize", peers=both).vs_rival == 0.2
    assert row("m1", op="quantize", peers={"torch": 1.0}).rival is None
    assert row("m1", op="mla_decode", peers={"unshared": 1.0, "flashmla": 2.0}).rival == "flashmla"


# ---- tables of the documentation ---------------------------------------------------------------------------------


def of_gpu(*rows, **others):
    families = {"gemm": rows, **others}
    return {name: saved.Saved(name, {}, {}, tuple(some)) for name, some in families.items()}


def filled(words, gpus):
    made = tables.fill(f"before\n<!-- speed: {words} -->\nold\n<!-- /speed -->\nafter\n", gpus)
    return made.replace("\u00a0", " ").splitlines()


def test_tables_of_operations_are_filled_in():
    fast = row("m1", us=5.0, tflops=1200.0, peers={"torch": 6.0, "cublaslt": 5.5})
    gpus = {"h100": of_gpu(row("m1"), fast, row("m2")), "h200": of_gpu(row("m1", us=4.0), row("m9", op="route"))}
    lines = filled("fp8_gemm", gpus)
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert lines[2] == "| workload | H100, µs | rate | % of roof | × best peer | H200, µs | × best peer |"
    assert lines[4] == "| m1 | 5.00 | 1,200 TFLOP/s | 50 | 1.10 cuBLASLt | 4.00 | – |"
    assert lines[5] == "| m2 | 10.0 | 1.00 GB/s | 50 | – | – | – |"
    once = tables.fill("<!-- speed: fp8_gemm -->\n<!-- /speed -->", gpus)
    assert tables.fill(once, gpus) == once
    assert "Not measured yet." in filled("x", gpus)
    assert filled("fp8_gemm route", gpus)[4].startswith("| `fp8_gemm` | m1 | 5.00 |")


def test_a_table_says_where_a_portable_kernel_stands_beside_hoppers():
    gpus = {"h200": of_gpu(row("m1", us=4.0)), "h100": of_gpu(row("m1", us=9.0, impl="triton"))}
    assert filled("fp8_gemm", gpus)[4].startswith("| m1 | 4.00 | 1.00 GB/s | 50 | – | 9.00 (triton) | – |")


def test_a_sweep_is_of_its_curves_alone():
    gpus = {"h200": of_gpu(row("m1", us=4.0), scaling=[row("m1", us=1.0), row("m2")])}
    assert len(filled("fp8_gemm", gpus)) == 7
    assert [job.us for job in saved.jobs(gpus["h200"])] == [4.0]


def test_the_summary_has_a_line_for_each_operation():
    rows = [
        *(row("m1", peers={"torch": 20.0}), row("m2", peers={"torch": 5.0, "cublaslt": 4.0})),
        *(row("t1", op="route"), row("t2", op="route", peers={"torch_compile": 20.0, "torch": 40.0})),
    ]
    lines = filled("* h100", {"h100": of_gpu(*rows)})
    assert lines[2] == "| operation | workloads | % of roof | × peer | which | × eager torch |"
    assert lines[4:-2] == [
        "| `fp8_gemm` | 2 | 50 | 0.89 (0.40 to 2.00) | torch bf16, cuBLASLt | – |",
        "| `route` | 2 | 50 | 2.00 | torch.compile | 4.00 |",
    ]
    assert "Not measured yet." in filled("* h200", {})


def test_a_grid_has_rows_across_and_other_sizes_down():
    fast = row("m4096_n8_k9", tflops=1200.0, peers={"torch": 6.0, "cublaslt": 20.0})
    rows = [fast, row("m1_n8_k9", peers={"cublaslt": 12.0}), row("m1_n7_k9", us=100.0, peers={"torch": 400.0})]
    lines = filled("grid fp8_gemm h200", {"h200": of_gpu(*rows)})
    assert lines[2] == "| N x K | M 4,096 | M 1 |"
    assert lines[4:-2] == [
        "| 8 x 9 | 1,200 TFLOP/s, 0.60 torch bf16 | 10.0 µs, 1.20 |",
        "| 7 x 9 | – | 100 µs, 4.00 torch bf16 |",
        "| geometric mean | 0.60 | 1.20 |",
    ]


def test_headlines_are_of_the_gpu_that_was_measured_last():
    n = "_n4096_k7168"
    rows = [row(f"m4096{n}", tflops=1200.0, peers={"cublaslt": 12.0}), row("m4096_n576_k7168", tflops=1.0)]
    rows += [row("m4096_n7168_k2048", tflops=1300.0, peers={"cublaslt": 15.0}), row("m1_n7168_k2048")]
    lines = filled("headlines", {"h200": of_gpu(*rows), "h100": of_gpu()})
    size = "M 4,096, five linears of DeepSeek-V3"
    assert lines[4:-2] == [f"| `fp8_gemm` | {size} | 1,200 to 1,300 TFLOP/s | 50 | cuBLASLt | 1.20 to 1.50 |"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("h200 fp8_gemm m1 us", "10.0"),
        ("h200 fp8_gemm m* ms", "0.0100 to 1.50"),
        ("h200 fp8_gemm m* us each", "10.0 and 1,500"),
        ("h200 fp8_* m2 tflops", "1,200"),
        ("h200 fp8_gemm m1 times", "1.20"),
        ("h200 fp8_gemm m1 peer_us", "12.0"),
        ("h200 fp8_gemm m2 roof each", "50"),
        ("h200 route_in_graph 20x_* call_us", "2.5"),
    ],
)
def test_figures_in_a_sentence_are_filled_in(asked, said):
    gpus = {
        "h200": of_gpu(
            row("m1", peers={"cublaslt": 12.0}),
            row("m2", us=1500.0, tflops=1200.0),
            row("20x_t1", op="route_in_graph", us=50.0),
        )
    }
    text = f"It takes <!-- saved: {asked} -->old<!-- /saved --> here, | <!-- saved: {asked} --><!-- /saved --> | there"
    made = tables.fill(text, gpus)
    assert re.sub(r"<!-- .*? -->", "", made) == f"It takes {said} here, | {said} | there"
    assert tables.fill(made, gpus) == made


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("h200 fp8_gemm m9 us", "m9 us: nothing of it is saved"),
        ("h100 fp8_gemm m1 us", "nothing of it is saved"),
        ("h200 fp8_gemm m1 furlongs", "expected a GPU, an operation, a workload and one of us, ms"),
        ("h200 fp8_gemm us", "expected a GPU"),
        ("h200 fp8_gemm m1 times", "no peer is saved"),
        ("h200 fp8_gemm m1 host", "what a call costs the host is not saved"),
    ],
)
def test_a_figure_that_is_not_saved_is_an_error_that_names_it(asked, message):
    with pytest.raises(saved.NotThere, match=message):
        tables.fill(f"x <!-- saved: {asked} -->1<!-- /saved -->", {"h200": of_gpu(row("m1"))})


def test_no_line_of_the_documentation_begins_with_a_figure():
    for page in [report.README, *report.DOCS.rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^\s*<!-- /?saved", text, re.MULTILINE), page
        assert text.count("<!-- saved:") == text.count("<!-- /saved -->") == len(figures.INLINE.findall(text)), page


def test_every_headline_is_of_a_workload_that_there_is():
    for headline in headlines.HEADLINES:
        cases = [case for some in cli.select(cli.FAMILIES, []).values() for case in some if case.op == headline.op]
        assert any(re.fullmatch(headline.workloads, case.workload.name) for case in cases), headline


def test_what_is_published_is_what_is_saved():
    """`make report` after saving results: README, the documentation and the page say what the files say."""
    gpus = saved.everything()
    pages = [report.README, *sorted(report.DOCS.rglob("*.md"))]
    stale = [page for page in pages if tables.fill(text := page.read_text(encoding="utf-8"), gpus) != text]
    assert stale == []
    assert (report.DOCS / "report.html").read_text(encoding="utf-8") == report.page(gpus)
