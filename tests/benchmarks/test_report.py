"""docs/performance.md: every row of a result file is on it, the losing and the refused ones too."""

from benchmarks import report, results

HEADER = {"device": "a machine", "commit": "abc", "complete": "yes"}


def row(provider, part="both", **fields):
    labels = {"op": "gelu", "shape": "8x8", "dtype": "float32", "variant": "approximate=none"}
    return {**labels, "provider": provider, "part": part, "gate": "pass", "note": "", **fields}


def page_of(tmp_path, rows, name="gelu.csv", header=HEADER):
    results.write_csv(tmp_path / "machine" / name, header, rows)
    return report.page(tmp_path)


def test_rows_that_lose_or_are_wrong_or_refused_stay(tmp_path):
    numbers = {"ms": 2.0, "percent_of_roof": 41.0}
    text = page_of(
        tmp_path,
        [
            row("eager", ratio=1.0, cpu_ratio=1.0, **numbers),
            row("cpu", ratio=0.5, cpu_ratio=0.6, **numbers),
            row("compiled", gate="FAIL output: error 1"),
            row("triton", note="refused: rows are too long"),
        ],
    )
    assert "| 0.50 / 0.60 (41 %) | wrong: no number | refused |" in text
    assert "- triton: refused: rows are too long" in text
    assert "## a machine" in text and "- commit: abc" in text


def test_where_eager_is_faster(tmp_path):
    def of(provider, ratio, part="both", **fields):
        return row(provider, part, ratio=ratio, ms=1.0, percent_of_roof=3.0, **fields)

    rows = [
        *(of("eager", 1.0, part) for part in ("inference", "backward", "both")),
        of("cpu", 0.75, "inference"),
        of("cpu", 0.25, "backward"),  # half of a step that wins
        of("cpu", 1.5),
        of("eager", 1.0, shape="2x8"),
        row("cpu", shape="2x8", note="delegates to eager: it is small"),
        of("torch", 0.9, shape="2x8"),
        of("compiled", 0.1, shape="2x8"),
    ]
    text = page_of(tmp_path, rows)
    assert "in 2 of 3 rows" in text
    assert "| gelu | 8x8 | float32 | approximate=none | inference | cpu | 0.75 |" in text
    assert "| gelu | 2x8 | float32 | approximate=none | both | torch | 0.90 |" in text


def test_an_incomplete_file_says_so(tmp_path):
    rows = [row("eager", ratio=1.0, ms=1.0, percent_of_roof=3.0)]
    text = page_of(tmp_path, rows, header=HEADER | {"complete": "no: 1 of 4"})
    assert "- incomplete: 1 of 4 cases" in text


def test_check_notices_a_page_that_is_out_of_date(tmp_path, capsys):
    page_of(tmp_path / "results", [row("eager", ratio=1.0, ms=1.0, percent_of_roof=3.0)])
    where = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]
    where += ["--readme", str(tmp_path / "README.md")]
    assert report.main([*where, "--check"]) == 1
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0
    (tmp_path / "page.md").write_text("typed by hand")
    assert report.main([*where, "--check"]) == 1


def test_readme_table_is_renewed_between_its_markers(tmp_path):
    rows = [{"shape": "tiny 4x64", "dtype": "float32", "provider": "slim", "ratio": 2.5}]
    facts = HEADER | {"torch": "2.13.0"}
    results.write_csv(tmp_path / "machine" / "bert_training.csv", facts, rows)
    text = report.renewed(f"before {report.BEGIN} old {report.END} after", tmp_path)
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| tiny 4x64 | float32 | slim | 2.50 |" in text
