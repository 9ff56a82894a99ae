from prunelle.export.markup import Markup, join, tag


def test_text_is_escaped_wherever_it_stands():
    """A sentence of the test set that is HTML would run in the reader's browser."""
    evil = "<script>alert('1')</script>\"&"
    assert tag("td", evil) == "<td>&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot;&amp;</td>"
    assert tag("p", "", title=evil).count("<") == 2
    assert tag("p", "", title=evil).count('"') == 2
    assert "<script" not in join(evil, tag("b", evil))


def test_markup_is_escaped_once():
    """Markup joined to text must not turn the text into markup."""
    assert tag("p", tag("b", "1 < 2"), " & ") == "<p><b>1 &lt; 2</b> &amp; </p>"
    assert not isinstance(tag("b", "x") + "<i>", Markup)


def test_attributes():
    assert (
        tag("line", stroke_width=1, class_="x", x=1.25, id=None) == '<line stroke-width="1" class="x" x="1.2"></line>'
    )
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
