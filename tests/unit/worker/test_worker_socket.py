"""A rank's socket, asked as an agent asks and as nobody should."""

import fcntl
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from staged_images import ALL_SEALS, flat_image, manifest_of, memory, staged

from weightsync_contract.messages import VersionId
from weightsync_engine.reference.model_files import TINY, random_weights
from weightsync_engine.worker import server as server_module
from weightsync_engine.worker.client import UnreachableError, WorkerClient, WorkerRefusedError
from weightsync_engine.worker.protocol import Hello, Image, Problem
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.sockets import rank_sockets, short_name
from weightsync_engine.worker.state import RefusedError, WorkerState

HELLO = Hello("boot-1", 0, 1, "test 1", os.getpid())
WEIGHTS = random_weights(TINY, 3)
MANIFEST = manifest_of(WEIGHTS)
IMAGE = Image(VersionId("run-a", 4), MANIFEST.layout, "xxh3-128:0")


class Rank:
    def __init__(self, directory: Path) -> None:
        self.state = WorkerState(HELLO)
        self.ended = threading.Event()
        self.server = WorkerServer(directory, "0", self.state, self.ended.set)
        self.server.start()
        self.path = self.server.path
        self.client = WorkerClient(self.path, 5.0)


@pytest.fixture
def rank(tmp_path):
    rank = Rank(tmp_path)
    yield rank
    rank.server.close()


@pytest.fixture
def sealed():
    fd = memory(flat_image(WEIGHTS))
    yield fd
    os.close(fd)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_for_fds(count: int) -> None:
    """The server's threads close their ends a moment after they have answered."""
    until = time.monotonic() + 5
    while open_fds() > count:
        assert time.monotonic() < until
        time.sleep(0.01)


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:staged")


def raw(path: Path, *parts: bytes, fds=()) -> bytes:
    """Send bytes as they are; the answer's bytes until the end of the connection or a line."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        for number, part in enumerate(parts):
            if fds and not number:
                socket.send_fds(connection, [part], list(fds))
            else:
                connection.sendall(part)
        answer = b""
        while not answer.endswith(b"\n"):
            data = connection.recv(4096)
            if not data:
                break
            answer += data
        return answer


def test_hello_and_status(rank):
    assert rank.client.hello() == HELLO
    status = rank.client.status()
    assert (status.hello, status.attached, status.applied, status.clean) == (HELLO, None, None, True)


def test_a_version_goes_in_and_what_was_done_comes_out(rank, sealed):
    rank.client.manifest(MANIFEST)
    rank.state.checked(MANIFEST.layout, ())
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    assert rank.client.status().attached == IMAGE
    begun = rank.state.begin(IMAGE)
    assert bytes(begun.memory) == flat_image(WEIGHTS)
    rank.state.touching()
    assert (rank.client.status().clean, rank.client.status().applied) == (False, None)
    with pytest.raises(WorkerRefusedError, match="being applied"):
        rank.client.drop()
    with pytest.raises(WorkerRefusedError, match="being applied"):
        rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    rank.state.end(IMAGE)
    status = rank.client.status()
    assert (status.applied, status.attached, status.clean, status.error) == (IMAGE, None, True, "")


def test_a_failure_in_mid_apply_stays_unclean_and_takes_no_update_any_more(rank, sealed):
    rank.client.manifest(MANIFEST)
    rank.state.checked(MANIFEST.layout, ())
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    rank.state.begin(IMAGE)
    rank.state.touching()
    rank.state.end(None, "out of memory")
    status = rank.client.status()
    assert (status.clean, status.applied, status.error) == (False, None, "out of memory")
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    with pytest.raises(RefusedError, match="restarted"):
        rank.state.begin(IMAGE)


def test_a_loader_that_writes_into_its_tensors_changes_nobody_elses(rank, sealed):
    rank.client.manifest(MANIFEST)
    rank.state.checked(MANIFEST.layout, ())
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    rank.state.begin(IMAGE).memory[0:4] = b"\xff" * 4
    assert os.pread(sealed, 4, 0) == flat_image(WEIGHTS)[:4]


BEGUN_WRONGLY = [
    ("attached is run-a/4", Image(VersionId("run-a", 5), IMAGE.layout, IMAGE.digest)),
    ("attached is run-a/4", Image(VersionId("run-b", 4), IMAGE.layout, IMAGE.digest)),
    ("attached is run-a/4", Image(IMAGE.version, IMAGE.layout, "xxh3-128:1")),
    ("attached is run-a/4", Image(IMAGE.version, "sha256:0", IMAGE.digest)),
]


@pytest.mark.parametrize(("words", "image"), BEGUN_WRONGLY)
def test_only_the_very_image_is_begun(rank, sealed, words, image):
    rank.client.manifest(MANIFEST)
    rank.state.checked(MANIFEST.layout, ())
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    with pytest.raises(RefusedError, match=words):
        rank.state.begin(image)


def test_nothing_is_begun_unless_it_was_checked(rank, sealed):
    with pytest.raises(RefusedError, match="no image is attached"):
        rank.state.begin(IMAGE)
    rank.client.manifest(MANIFEST)
    rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    with pytest.raises(RefusedError, match="has not been checked"):
        rank.state.begin(IMAGE)
    rank.state.checked(MANIFEST.layout, (Problem("a", "is wrong", "mend it"),))
    with pytest.raises(RefusedError, match="a: is wrong; mend it"):
        rank.state.begin(IMAGE)
    # Another manifest's check is none for this one.
    rank.state.checked("sha256:0", ())
    with pytest.raises(RefusedError, match="has not been checked"):
        rank.state.begin(IMAGE)


def test_another_manifest_forgets_the_check_and_the_same_one_keeps_it(rank):
    other = manifest_of({"a": WEIGHTS["model.norm.weight"]})
    rank.client.manifest(MANIFEST)
    rank.state.checked(MANIFEST.layout, ())
    rank.client.manifest(MANIFEST)
    assert rank.client.status().preflight is not None
    rank.client.manifest(other)
    assert (rank.client.status().preflight, rank.client.status().manifest) == (None, other.layout)


SEALS = [0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW, ALL_SEALS & ~fcntl.F_SEAL_WRITE]


@pytest.mark.parametrize("seals", SEALS)
def test_memory_that_could_still_change_is_refused(rank, seals):
    rank.client.manifest(MANIFEST)
    fd = memory(flat_image(WEIGHTS), seals)
    try:
        with pytest.raises(WorkerRefusedError, match="not sealed"):
            rank.client.attach(IMAGE, MANIFEST.nbytes, fd)
    finally:
        os.close(fd)
    assert rank.client.status().attached is None


def test_what_is_no_memory_is_refused(rank, tmp_path):
    rank.client.manifest(MANIFEST)
    (tmp_path / "file").write_bytes(flat_image(WEIGHTS))
    with (tmp_path / "file").open("rb") as file, pytest.raises(WorkerRefusedError, match="sealed"):
        rank.client.attach(IMAGE, MANIFEST.nbytes, file.fileno())


def test_memory_of_another_size_or_layout_is_refused(rank, sealed):
    with pytest.raises(WorkerRefusedError, match="the kept manifest is none"):
        rank.client.attach(IMAGE, MANIFEST.nbytes, sealed)
    rank.client.manifest(MANIFEST)
    with pytest.raises(WorkerRefusedError, match="but the manifest's image has"):
        rank.client.attach(IMAGE, MANIFEST.nbytes - 256, sealed)
    longer = memory(flat_image(WEIGHTS) + b"\0" * 256)
    try:
        with pytest.raises(WorkerRefusedError, match=f"the memory has {MANIFEST.nbytes + 256} bytes"):
            rank.client.attach(IMAGE, MANIFEST.nbytes, longer)
    finally:
        os.close(longer)


def test_a_manifest_that_is_another_than_it_says_is_refused(rank):
    question = {"op": "manifest", "layout": "sha256:0", "data": MANIFEST.encode().decode()}
    answer = json.loads(raw(rank.path, json.dumps(question).encode() + b"\n"))
    assert (answer["ok"], "not sha256:0" in answer["error"]) == (False, True)
    question = {"op": "manifest", "layout": MANIFEST.layout, "data": "[[1]]"}
    assert "malformed manifest" in raw(rank.path, json.dumps(question).encode() + b"\n").decode()


def test_drop_lets_go_of_the_memory(rank):
    rank.client.manifest(MANIFEST)
    fds, before = open_fds(), mapped()
    with staged(WEIGHTS, 4) as given:
        rank.client.attach(IMAGE, given.nbytes, given.fd)
    assert mapped() == before + 1
    rank.client.drop()
    rank.client.drop()
    assert mapped() == before
    wait_for_fds(fds)


MALFORMED = [
    b"\n",
    b"null\n",
    b"[]\n",
    b"{}\n",
    b"{\n",
    b"\xff\xfe\n",
    b'{"op": null}\n',
    b'{"op": ["hello"]}\n',
    b'{"op": "unknown"}\n',
    b'{"op": "manifest"}\n',
    b'{"op": "manifest", "layout": 1, "data": 2}\n',
    b'{"op": "attach"}\n',
    b'{"op": "attach", "nbytes": "1"}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("question", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_questions_are_refused_and_the_next_one_is_answered(rank, question):
    answer = json.loads(raw(rank.path, question))
    assert (answer["ok"], bool(answer["error"])) == (False, True)
    assert rank.client.hello() == HELLO


def test_a_malformed_attach_with_a_descriptor_leaks_none(rank, sealed):
    fds = open_fds()
    for question in (b'{"op": "attach", "nbytes": 1}\n', b'{"op": "hello"}\n', b"{\n"):
        raw(rank.path, question, fds=[sealed, sealed])
    wait_for_fds(fds)


def test_an_oversized_question_is_refused(rank, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_LINE", 1000)
    answer = raw(rank.path, b"x" * 1001)
    assert b"more than 1000 bytes" in answer
    assert rank.client.hello() == HELLO


def test_two_questions_at_once_are_refused(rank):
    assert b"one question at a time" in raw(rank.path, b'{"op": "hello"}\n{"op": "hello"}\n')


def test_who_connects_and_says_nothing_holds_up_nobody(rank, monkeypatch):
    monkeypatch.setattr(server_module, "READ_SECONDS", 0.2)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(server_module.MAX_CONNECTIONS - 1)]
    try:
        for connection in silent:
            connection.connect(str(rank.path))
            connection.sendall(b'{"op"')
        assert rank.client.hello() == HELLO
        # Half a question is not waited for any longer: the connection ends.
        silent[0].settimeout(5)
        assert silent[0].recv(100) == b""
    finally:
        for connection in silent:
            connection.close()


def test_more_connections_than_it_takes_are_answered_in_turn(rank):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(rank.client.hello())) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [HELLO] * 40


def test_a_connection_takes_several_questions(rank):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rank.path))
        for _ in range(3):
            connection.sendall(b'{"op": "hello"}\n')
            assert json.loads(connection.recv(4096))["boot"] == "boot-1"


def test_exit_answers_and_ends(rank):
    rank.client.exit("test")
    assert rank.ended.wait(5)


def test_a_socket_that_was_left_behind_is_replaced(tmp_path):
    first = Rank(tmp_path)
    first.server.close()
    with pytest.raises(UnreachableError):
        first.client.hello()
    second = Rank(tmp_path)
    try:
        assert first.client.hello() == HELLO
        assert rank_sockets(tmp_path) == {0: second.path}
        assert second.path.stat().st_mode & 0o777 == 0o600
    finally:
        second.server.close()


def test_a_long_path_is_no_trouble(tmp_path):
    directory = tmp_path.joinpath(*["d" * 60] * 4)
    rank = Rank(directory)
    try:
        assert len(str(rank.path)) > 200
        assert rank.client.hello() == HELLO
    finally:
        rank.server.close()


def test_nobody_there_is_unreachable(tmp_path):
    with pytest.raises(UnreachableError, match="nothing"):
        WorkerClient(tmp_path / "nothing" / "0.sock", 1).hello()


def test_an_engine_that_stands_still_is_unreachable_in_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path;"
        "from weightsync_engine.worker.server import WorkerServer;"
        "from weightsync_engine.worker.state import WorkerState;"
        "from weightsync_engine.worker.protocol import Hello;"
        "WorkerServer(Path(sys.argv[1]), '0', WorkerState(Hello('b', 0, 1, 'x', 1))).start();"
        "print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        client = WorkerClient(tmp_path / "workers" / "0.sock", 0.5)
        assert client.hello().boot == "b"
        os.kill(process.pid, 19)
        began = time.monotonic()
        with pytest.raises(UnreachableError):
            client.hello()
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "answer", [b"", b"{}\n", b"[]\n", b"nonsense\n", b'{"ok": true, "boot": 1}\n', b"half"]
)
def test_answers_of_another_form_are_no_answers(tmp_path, answer):
    path = tmp_path / "0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        with short_name(path) as address:
            listener.bind(address)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises((UnreachableError, WorkerRefusedError)):
            WorkerClient(path, 2).hello()
        thread.join()
