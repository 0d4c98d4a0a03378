"""The live page's server, by plain HTTP: what it answers, to whom, and what it says of runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.unit.trainer.page.runs import step_record, write_whole_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.page import live as live_room
from zeropipe.trainer.page.live import LiveRuns, runs_in, state_of
from zeropipe.trainer.page.server import PageServer
from zeropipe.trainer.page.terminal import runs_table


@pytest.fixture
def served(tmp_path, request):
    write_whole_run(tmp_path / "one", 20)
    (tmp_path / "secret.txt").write_text("s3cr3t")
    server = PageServer(LiveRuns(tmp_path / "one"), getattr(request, "param", "127.0.0.1"), 0)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What the server answers; of events, the first."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    events = answer.headers["Content-Type"] == "text/event-stream"
    body = answer.readline() if events else answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def test_it_serves_the_page_and_the_runs(served):
    status, headers, page = ask(served, "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and headers["Cache-Control"] == "no-store"
    assert b"connect-src 'self'" in page and b'"live":true' in page
    status, _, line = ask(served, "/events")
    (run,) = json.loads(line.removeprefix(b"data: "))
    assert (
        status == 200
        and run["name"] == "one"
        and run["state"] == {"kind": "finished", "said": "finished, step 20 of 20"}
    )
    assert run["figures"][0]["lines"][0]["x"] == list(range(1, 21))


@pytest.mark.parametrize(
    "path",
    ["/../secret.txt", "/..%2fsecret.txt", "//secret.txt", "/one/metrics.jsonl", "/etc/passwd", "/events/"],
)  # fmt: skip
def test_no_path_is_a_file(served, path):
    status, _, body = ask(served, path)
    assert status == 404 and b"s3cr3t" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_is_written(served, method):
    assert ask(served, "/events", method)[0] == 405


@pytest.mark.parametrize("path", ["/", "/events"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name of theirs that leads to this machine
        {"Host": "evil.example:6070"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(served, path, headers):
    status, found, body = ask(served, path, **headers)
    assert status == 403 and b"data" not in body and "Access-Control-Allow-Origin" not in found


def test_another_site_gets_no_events_but_may_link_here_and_a_tunnel_may_have_a_port_of_its_own(served):
    assert ask(served, "/events", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(served, "/", Sec_Fetch_Site="cross-site")[0] == 200
    assert ask(served, "/events", Host="localhost:9999", Origin="http://localhost:9999")[0] == 200


@pytest.mark.parametrize("served", ["0.0.0.0"], indirect=True)
def test_beyond_the_loopback_a_token_is_asked_for(served):
    query = urlsplit(served.url).query
    assert len(query) > 25
    for path in ("/", "/events", "/?token=", "/?token=wrong", f"/events?{query}"):
        assert ask(served, path)[0] == 403
    status, headers, _ = ask(served, f"/?{query}", Host="node1.cluster:6070")
    assert (status, headers["Location"]) == (303, "/")
    cookie, *how = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(how)
    assert ask(served, "/", Cookie=cookie)[0] == ask(served, "/events", Cookie=cookie)[0] == 200
    assert ask(served, "/events", Cookie=cookie + "x")[0] == 403
    assert ask(served, "/events", Cookie=cookie, Origin="https://evil.example")[0] == 403


def test_an_event_follows_each_change(served, tmp_path):
    connection = socket.create_connection(served.server_address[:2], timeout=60)
    connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    stream = connection.makefile("rb")
    assert last_step(stream) == 20
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_record(21, 1e-4, 0, "b")) + "\n")
    assert last_step(stream) == 21
    connection.close()


def last_step(stream: Any) -> int:
    for line in stream:
        if line.startswith(b"data: "):
            return json.loads(line[6:])[0]["figures"][0]["lines"][0]["x"][-1]
    raise AssertionError("the stream has ended")


def test_how_a_run_is_is_told_from_its_record():
    def records(*times: float, **last: Any) -> list[dict[str, Any]]:
        start = {"kind": "event", "event": "start", "step": 0, "total_steps": 10, "run": "a", "time": 0.0}
        steps = [{"kind": "train", "step": n, "run": "a", "time": at} for n, at in enumerate(times, 1)]
        return [start, *steps, *([{"kind": "event", "step": 1, "run": "a", "time": times[-1], **last}] if last else [])]

    assert state_of(records(1, 2, 3), 3, 100) == {"kind": "training", "said": "training, step 3 of 10"}
    assert state_of(records(1, 2, 3), 3, 124)["kind"] == "silent"
    assert state_of(records(1, 2, 103), 103, 103 + 499)["kind"] == "training", "steps of 101 s"
    found = state_of(records(1, 2, 103), 103, 103 + 506)
    assert found == {
        "kind": "silent",
        "said": "no word since 1970-01-01 00:01 UTC: stopped, or hanging, at step 3 of 10",
    }
    assert state_of(records(1, event="failed", error="RankFault('x')"), 1, 1e9)["said"].endswith("RankFault('x')")
    assert state_of(records(*range(10)), 9, 1e9)["kind"] == "finished"


def test_a_folder_of_runs_one_of_which_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(live_room, "_SHARE", 0)
    live = LiveRuns(tmp_path)
    assert main(["watch", str(tmp_path)]) == 2
    write_whole_run(tmp_path / "good", 20)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
    bad, good = json.loads(live.text())
    assert (bad["name"], bad["figures"], good["name"]) == ("bad", [], "good")
    assert bad["state"]["kind"] == "failed" and "line 1" in bad["state"]["said"]
    assert [path.name for path in runs_in(tmp_path)] == ["bad", "good"]
    shown = runs_table(live.runs())
    assert [list(column.cells)[1] for column in shown.columns][2] == "5.1500"
    old = time.time() - 3600
    (tmp_path / "bad" / "metrics.jsonl").write_text(json.dumps(step_record(1, 1e-4, 0, "a")) + "\n")
    os.utime(tmp_path / "bad" / "metrics.jsonl", (old, old))
    assert json.loads(live.text())[0]["state"]["kind"] == "silent"


def test_the_verb_prints_where_it_is_and_a_port_that_is_taken_is_told(tmp_path, capsys):
    run = write_whole_run(tmp_path / "one", 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["watch", str(run), "--port", str(port)]) == 2
        assert f"--port {port}: Address already in use" in capsys.readouterr().err
    process = subprocess.Popen(
        [sys.executable, "-m", "zeropipe.launcher", "watch", str(run), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().split()[1])
        connection = HTTPConnection(address.hostname or "", address.port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(2)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert main(["watch", str(run), "--tui"]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "20 of 20" in said and "5.1500" in said
