"""The page: what it shows, that it is whole by itself, and how a browser gets the next one."""

import re
import socket
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from xml.etree import ElementTree

import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.watch.page import render_page
from mythos_jax.watch.reading import WatchedRun
from mythos_jax.watch.serving import page_server


def lines(count, **more):
    return [
        {"step": step, "time": 1000.0 + step, "loss": 4.0 / step, "mean_loops": 2.0, "step_seconds_p50": 0.5, **more}
        for step in range(1, count + 1)
    ]


def page(*made, every=5.0, refresh=None):
    return render_page([WatchedRun(one.path) for one in made], "mythos watch <x>", every, refresh)


def sections(html):
    return re.findall("<h2>(.*?)</h2>", html)


def test_one_run(make_run):
    made = make_run(name="a <b>")
    made.event("start", 1000.0, step=0, reached=0, devices=8, device_kind="TPU v5e", host="h<i>")
    made.event("end", 1010.0, step=12, how="failed", message="step 13: loss is <nan>")
    made.event("start", 1020.0, step=10, reached=12, reached_time=1012.0, devices=8, device_kind="TPU v5e", host="h<i>")
    made.log(
        *lines(40, expert_load=[[0.25, 0.75], [0.5, 0.5]], load_imbalance=1.5, mfu=0.25),
        {"step": 40, "held_out_loss": 0.5},
    )
    html = page(made)
    assert sections(html) == ["Now", "Loss", "Depth and speed", "Where the time went", "Starts and ends", "Expert load"]
    assert "a &lt;b&gt;" in html
    assert not re.search("<[bi]>|<nan>|<x>", html)
    for part in ["<dd>40 of 100 (40%)</dd>", "<dd>25.0%</dd>", ">75.0%</td>", "failed, step 13: loss is &lt;nan&gt;",
                 "8 TPU v5e on h&lt;i&gt;, 2 logged steps again", "<td class=word>restart</td>",
                 "20 s (50.0%)"]:  # fmt: skip
        assert part in html, part
    # Nothing is loaded: no address but those of names in XML, and the icon that is none.
    assert re.findall(r'(?:href|src)="([^"]*)"', html) == ["data:,"]
    assert "http" not in html.replace("http-equiv", "")


def test_several_runs_are_drawn_together(make_run):
    first, second, third = make_run("a", name="a"), make_run("b", name="b"), make_run("c", name="c")
    first.log(*lines(1000))
    second.log(*lines(500), {"step": 500, "held_out_loss": 0.25})
    html = page(first, second, third)
    assert sections(html) == ["Now", "Loss", "Depth and speed"]
    (chart,) = re.findall(r'<svg viewBox="0 0 460 300".*?</svg>', html.split("<h2>Depth")[0])
    svg = ElementTree.fromstring(chart)
    drawn = [line.get("points").split() for line in svg.iter("polyline")]
    assert [len(points) for points in drawn] == [200, 167, 1, 0]
    # The mean of five lines, on a logarithmic axis: y is linear in its logarithm, and x in the step.
    heights = [float(point.split(",")[1]) for point in drawn[0]]
    assert heights == sorted(heights)
    assert "b: held out" in html
    table = html.split('aria-label="Losses at equal steps"')[1].split("</table>")[0]
    mean = f"{4 * sum(1 / step for step in range(439, 501)) / 62:.4f}"
    assert re.findall("<td>(.*?)</td>", table)[-4:] == ["500", mean, mean, "–"]


def test_a_run_that_has_logged_nothing(make_run):
    html = page(make_run())
    assert sections(html) == ["Now", "Loss"]
    assert "Nothing has been logged yet." in html


def test_nan_alone_makes_no_chart(make_run):
    made = make_run()
    made.log({"step": 1, "loss": None}, {"step": 2, "loss": None})
    assert "Nothing has been logged yet." in page(made)


def test_a_page_refreshes_itself(make_run):
    made = make_run()
    assert "script" not in page(made)
    assert "http-equiv" not in page(made)
    assert '<meta http-equiv="refresh" content="3">' in page(made, every=2.5, refresh="file")
    served = page(made, every=2.5, refresh="served")
    assert "setTimeout(look, 2500)" in served
    assert "http-equiv" not in served


@contextmanager
def serving(render):
    with page_server(0, render) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_page_is_served_to_this_machine_alone():
    def asked(path, host):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()

    with serving(lambda: "<p>ä") as port:
        for host in (f"127.0.0.1:{port}", "localhost:9999"):
            assert asked("/?x", host) == (200, "<p>ä".encode())
        assert asked("/../etc/passwd", f"127.0.0.1:{port}")[0] == 404
        for host in ("evil.example:80", "evil.example", ""):
            assert asked("/", host)[0] == 403
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--port {number}: cannot listen there \(Address already in use\)$"):
            page_server(number, str)
