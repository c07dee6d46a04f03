"""A page is one file, and its boxes, tables, plots and code are on it, escaped."""

from matplotlib.figure import Figure

from tealightning.reporting.tables import Box, Plot, Section, Table, TableCell, html_page

TABLE = Table(
    key="numbers",
    title="Numbers",
    note="How to read them.",
    columns=["name", "value"],
    rows=[[TableCell(text="a<b"), TableCell(kind="number", value=1.23456, low=1.0, high=2.0, star=True)]],
)


def test_page_has_every_part_and_escapes_text():
    plot = Plot(name="curve", figure=Figure(), caption="A curve.", alt="A curve over n.")
    page = html_page(
        "T & U",
        boxes=[Box(title="Summary", text="At n = 1, fine.", bullets=["<one>"])],
        sections=[
            Section(key="first", title="First", tables=[TABLE], plots=[plot]),
            Section(key="origin", title="Origin", code="run & go", facts={"seed": "0"}, folded_code=("Spec", "a: 1")),
        ],
        images={"curve": b"<svg/>"},
    )
    assert page.count("T &amp; U") == 2
    assert "&lt;one&gt;" in page and "run &amp; go" in page and "<dt>seed</dt><dd>0</dd>" in page
    assert '<th scope="row">a&lt;b</th>' in page
    assert 'data-value="1.23456"' in page and "[1.000, 2.000]" in page and "1.235<sup>*</sup>" in page
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+"' in page and 'alt="A curve over n."' in page
    assert '<a href="#first">First</a>' in page and "<summary>Spec</summary>\n<pre>a: 1</pre>" in page
    assert "http" not in page.split("<style>")[1]
