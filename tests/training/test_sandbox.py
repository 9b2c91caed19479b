"""Whatever a program does, the host gets one observation for it, and goes on."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k25lite.training.programs import LONGEST_PROGRAM
from k25lite.training.sandbox import GRACE, Observation, Sandbox
from k25lite.training.vision_tools import TOOLS, WORDS
from k25lite.world.pictures import draw_board, draw_string
from k25lite.world.scenes import CELLS, Thing

SECONDS = 0.5
WORDS_OF_BOARD = ["red-disc", "none", "blue-ring", "red-cross"]
BOARD = draw_board(
    [
        Thing("disc", "red", "still", (2, 5)),
        None,
        Thing("ring", "blue", "still", (0, 8)),
        Thing("cross", "red", "still", (4, 4)),
    ],
    2,
    Random(0),
)[0]
GOOD, ALIVE = ("find(img, 'blue')", BOARD), Observation("bottom-left", True)

# Lists that share their items: small in memory, endless to compare, all within one call into C.
SHARED = "a = [1]\nb = [1]\nfor i in range(80):\n  a = [a, a]\n  b = [b, b]\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(seconds=SECONDS, memory=64) as sandbox:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SECRET_KEY", "s3cret")
            sandbox.run([GOOD])
        yield sandbox


@pytest.fixture(scope="module")
def pair():
    """A sandbox with two workers, and its processes."""
    before = family()
    with Sandbox(workers=2, seconds=SECONDS) as sandbox:
        assert sandbox.run([GOOD] * 2) == [ALIVE] * 2
        yield sandbox, family() - before


def value(sandbox, program, image=BOARD):
    return sandbox.run([(program, image)])[0]


def family():
    return set(psutil.Process().children(recursive=True))


HOSTILE = {
    "import": ("import os", "Import"),
    "import from": ("from os import system", "ImportFrom"),
    "import function": ("__import__('os')", "no function __import__"),
    "dunder walk": ("''.__class__.__mro__[1].__subclasses__()", "no function Attribute"),
    "dunder": ("().__class__", "Attribute"),
    "attribute of a picture": ("img.tofile", "Attribute"),
    "method of a picture": ("img.tofile('x')", "no function Attribute"),
    "builtins": ("__builtins__", "no variable"),
    "guard": ("_Add", "no variable"),
    "the value": ("_value = 3\n_value", "no variable"),
    "open": ("open('/etc/passwd')", "no function open"),
    "socket": ("socket('localhost', 80)", "no function socket"),
    "eval": ("eval('1')", "no function eval"),
    "exec": ("exec('1')", "no function exec"),
    "compile": ("compile('1', '', 'eval')", "no function compile"),
    "getattr": ("getattr(img, 'shape')", "no function getattr"),
    "globals": ("globals()", "no function globals"),
    "type": ("type(1)", "no function type"),
    "print flood": ("print('x' * 10)", "no function print"),
    "function as a value": ("f = find\nf(img, 'red')", "no variable"),
    "function in a list": ("[find][0](img, 'red')", "no function Subscript"),
    "walrus": ("(x := 1)", "NamedExpr"),
    "lambda": ("lambda: 1", "Lambda"),
    "called lambda": ("(lambda: 1)()", "no function Lambda"),
    "def": ("def f(): return 1\nf()", "FunctionDef"),
    "class": ("class A: pass\n1", "ClassDef"),
    "while": ("while True: 1\n1", "While"),
    "with": ("with img: 1\n1", "With"),
    "try": ("try: 1\nexcept: 2\n1", "Try"),
    "global": ("global x\n1", "Global"),
    "del": ("del img\n1", "Delete"),
    "assert": ("assert 1\n1", "Assert"),
    "raise": ("raise 1\n1", "Raise"),
    "yield": ("(yield)", "Yield"),
    "await": ("await find", "Await"),
    "asynchronous comprehension": ("[x async for x in img]", "asynchronous"),
    "match": ("match 1:\n case 1: 2\n1", "Match"),
    "starred argument": ("max(*[1, 2])", "Starred"),
    "starred item": ("[*img]", "Starred"),
    "keyword": ("sorted([1], reverse=True)", "no keyword"),
    "keywords": ("max(**{})", "no keyword"),
    "f-string": ("f'{img}'", "JoinedStr"),
    "format": ("'{0.__class__}'.format(1)", "no function Attribute"),
    "percent format": ("'%99999999d' % 1", "no * and no %"),
    "bytes": ("b'1'", "constant"),
    "complex": ("1j", "constant"),
    "ellipsis": ("img[...]", "constant"),
    "set": ("{1, 2}", "Set"),
    "assignment to a tool": ("find = 3\nfind", "no variable"),
    "assignment to a builtin": ("len = 3\n1", "no variable"),
    "loop over a tool's name": ("for find in [1]: 2\n1", "no variable"),
    "comprehension over a tool's name": ("[1 for find in [1]]", "no variable"),
    "assignment to an item": ("a = [1]\na[0] = 2\na", "only a name"),
    "assignment to an attribute": ("img.x = 2\nimg", "Attribute"),
    "loop over items": ("a = [1]\nfor a[0] in [1]: 2\na", "only a name"),
    "power": ("10 ** 10 ** 8", "Pow"),
    "shift": ("1 << 99999", "LShift"),
    "huge constant": ("9" * 900, "constant"),
    "huge float": ("1e400", "constant"),
    "long string": (f"'{'x' * 200}'", "constant"),
    "repeated list": ("[0] * 1000000", "no * and no %"),
    "repeated string": ("10000 * 'x'", "no * and no %"),
    "doubled string": ("a = 'ab'\nfor i in range(90): a = a + a\na", "too large"),
    "doubled list": ("a = [0]\nfor i in range(90): a = a + a\na", "too large"),
    "squared number": ("a = 9\nfor i in range(90): a = a * a\na", "too large"),
    "subtracted number": ("a = 9\nfor i in range(9999): a = a - -a\na", "too large"),
    "number of a string": ("a = '9'\nfor i in range(13): a = a + a\nint(a)", "4300 digits"),
    "huge range": ("range(1000000)", "too large"),
    "loop over a huge range": ("for i in range(999999): 1\n1", "too large"),
    "brackets": ("(" * LONGEST_PROGRAM, "nested"),
    "far too many brackets": ("[" * 10**6, "too long"),
    "closed brackets": ("[" * 400 + "]" * 400, "nested"),
    "signs": ("-" * 900 + "1", "nested"),
    "far too many signs": ("-" * 100_000 + "1", "too long"),
    "negations": ("not " * 200 + "1", "nested"),
    "long sum": ("+".join("1" * 400), "nested"),
    "conditions": ("1 if 1 else " * 70 + "1", "nested"),
    "subscripts": ("img" + "[0]" * 300, "nested"),
    "nested loops": ("".join(f"{' ' * i}for x in y:\n" for i in range(33)) + " " * 33 + "1\n1", "nested"),
    "nested value": ("a = [1]\nfor i in range(5000): a = [a]\na", "nested"),
    "null byte": ("1\0", "ASCII"),
    "tab": ("1\t", "ASCII"),
    "identifier that is not ASCII": ("ﬁnd = 1\n1", "ASCII"),
    "surrogate": ("'\ud800'", "ASCII"),
    "empty": ("", "empty"),
    "blank": (" \n ", "empty"),
    "comment": ("# find", "no expression"),
    "no expression": ("a = 1", "no expression"),
    "no Python": ("find img red", "syntax"),
    "unfinished": ("find(img,", "never closed"),
    "indented": ("1\n  2", "indent"),
    "unknown name": ("top", "not defined"),
    "no argument": ("find()", "argument"),
    "endless loops": ("for a in range(9999):\n for b in range(9999): 1\n1", "time limit"),
    "endless comprehension": ("[0 for a in range(9999) for b in range(9999) if 0]", "time limit"),
    "endless generator": ("any(0 for a in range(9999) for b in range(9999))", "time limit"),
    "broadcast": (
        "a = img[:, :, :, None, None, None] * img\na[:, :, :, :, :, :, None, None, None] * img",
        "memory limit",
    ),
    "letters added to pixels": ("img + 'a'", "did not contain"),
    "doubled by sum": ("a = [0]\nfor i in range(90): a = sum([a, a], [])\nlen(a)", "memory limit"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_program_ends_as_an_error_and_the_next_one_runs(sandbox, case):
    program, clause = HOSTILE[case]
    hostile, next_one = sandbox.run([(program, BOARD), GOOD])
    assert not hostile.ok
    assert hostile.text.startswith("error: ")
    assert clause in hostile.text
    assert hostile.text.isprintable()
    assert next_one == ALIVE


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "call",
    [
        "a == b",
        "max(a, b)",
        "a in [b]",
        "a = (1,)\nfor i in range(80):\n  a = (a, a)\n{a: 1}",
    ],
)
def test_a_program_that_no_signal_stops_is_killed_alone(sandbox, call):
    began = time.monotonic()
    observations = sandbox.run([GOOD, (SHARED + call, None), GOOD, GOOD])
    assert time.monotonic() - began >= SECONDS + GRACE, "a signal was enough, so that this tests nothing"
    assert observations == [ALIVE, Observation("error: time limit", False), ALIVE, ALIVE]


@pytest.mark.timeout(60)
def test_a_program_that_crashes_the_interpreter_is_lost_alone():
    loop = f"for i in range(9999): a = {'(' * 10}a{',)' * 10}\n"
    program = f"a = 1\n{loop * 5}{{a: 1}}"  # half a million tuples, one in the other: hashing them overflows the stack
    with Sandbox(seconds=30) as sandbox:
        observations = sandbox.run([GOOD, (program, None), GOOD])
    assert observations == [ALIVE, Observation("error: worker died", False), ALIVE]


@pytest.mark.timeout(30)
def test_memory_is_limited_for_each_program_and_not_for_all(sandbox):
    big = "a = [0]\nfor i in range(21): a = sum([a, a], [])\nlen(a)"  # 16 MB, and at times 32
    assert [value(sandbox, big).text] * 9 == [o.text for o in sandbox.run([(big, None)] * 9)] == [str(2**21)] * 9


@pytest.mark.parametrize(
    "program",
    [
        SHARED + "a",
        SHARED + "str(a)",
        "[c for c in range(9999)]",
        "a = 'red '\nfor i in range(10): a = a + a\na",
        "[[c] for c in range(9999)]",
    ],
)
def test_a_flood_is_cut(sandbox, program):
    observation = value(sandbox, program)
    assert observation.ok
    assert 190 < len(observation.text) <= 200


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("find(img, 'red')", "top-left"),
        ("1 + 2 * 3", "7"),
        ("'a' + 'b'", "ab"),
        ("7 / 2", "3.5"),
        ("2 / 3", "0.6667"),
        ("1 < 2", "True"),
        ("None", "none"),
        ("[]", "none"),
        ("''", "none"),
        ("(1, 2, 3, 4)", "1 , 2 , 3 , 4"),
        ("[(1, 2), (3, 4)]", "1 , 2 , 3 , 4"),
        ("{'red': 2, 'blue': 1}", "red 2 , blue 1"),
        ("img", "picture 32 x 32"),
        ("mask(img, 'red')", "mask 32 x 32"),
        ("img[0, 0, 0] < 99", "True"),
        ("box(img, 'cyan')", "none"),
        ("box(img, 'disc')", "5 , 2 , 13 , 10"),
        ("center(box(img, 'disc'))", "9 , 6"),
        ("cell(img, 'top-right')", "picture 16 x 16"),
        ("[thing(c) for c in cells(img)]", "red-disc none blue-ring red-cross"),
        ("a, b = 3, 4; a * b", "12"),
        ("n = 0\nfor c in cells(img):\n  if colour(c) == 'red': n = n + 1\nn", "2"),
        ("{w: count(img, w) for w in ['red', 'blue']}['red']", "2"),
        ("max([area(mask(img, c)) for c in ['red', 'cyan']]) > 50", "True"),
        ("area(mask(img, 'red') | mask(img, 'blue')) == area(mask(img, 'red')) + area(mask(img, 'blue'))", "True"),
        ("b = box(img, 'ring')\nthing(img[b[1] : b[3], b[0] : b[2]])", "blue-ring"),
        ("sorted([3, 1, 2])[-1] if count(img, 'red') >= 2 else 'none'", "3"),
        ("any(colour(c) == 'blue' for c in cells(img))", "True"),
        ("list(enumerate(zip('ab', [1, 2])))", "0 , a 1 , 1 , b 2"),
        ("str([1, 2]) + str(img)", "1 , 2picture 32 x 32"),
        ("img / 2 - img % 2 + img * img", "picture 32 x 32"),
        ("int('7') + abs(-1) + round(2.6) + len(str(10))", "13"),
        ("  beside('top-left', 'down')  ", "bottom-left"),
    ],
)
def test_the_value_of_the_last_expression_is_told_in_words(sandbox, program, text):
    assert value(sandbox, program) == Observation(text, True)


@pytest.mark.parametrize(
    "program",
    [
        "find(img, 'red')",
        "more(img, 'red', 'blue')",
        "beside(find(img, 'cross'), 'up')",
        "[count(img, c) for c in ['red', 'blue', 'ring', 'none']]",
        "[thing(c) for c in cells(img)]",
        "colour(cell(img, 'bottom-right'))",
    ],
)
def test_a_program_says_the_same_of_a_told_board(sandbox, program):
    seen, told = sandbox.run([(program, BOARD), (program, WORDS_OF_BOARD)])
    assert seen.ok
    assert seen == told


def test_a_string_is_read_from_its_picture_and_from_itself(sandbox):
    picture = draw_string("K7QX2B", Random(0))
    assert sandbox.run([("read(img)", picture), ("read(img)", "K7QX2B")]) == [Observation("K7QX2B", True)] * 2


@pytest.mark.timeout(30)
def test_several_workers_keep_the_order(pair):
    programs = [(str(index), None) for index in range(9)]
    programs[3] = (SHARED + "a == b", None)
    sandbox, _ = pair
    texts = [observation.text for observation in sandbox.run(programs)]
    assert texts == ["0", "1", "2", "error: time limit", "4", "5", "6", "7", "8"]
    assert sandbox.run(programs[:1]) == [Observation("0", True)], "fewer programs than workers"
    assert sandbox.run([]) == []


@pytest.mark.timeout(30)
def test_a_keeper_that_is_killed_is_replaced(pair):
    sandbox, processes = pair
    processes.pop().kill()
    observations = sandbox.run([GOOD] * 4)
    died = Observation("error: worker died", False)
    assert observations in ([died, ALIVE, died, ALIVE], [ALIVE, died, ALIVE, died])
    assert sandbox.run([GOOD] * 4) == [ALIVE] * 4


def test_programs_share_nothing(sandbox):
    assert [o.ok for o in sandbox.run([("x = 1\nx", None), ("x", None)])] == [True, False]


TOKENS = [
    *TOOLS,
    "str",
    *sorted(WORDS),
    *CELLS,
    *"()[]{},:;=+-*/%<>.'\"\n 0123456789",
    "img",
    "for",
    "in",
    "if",
]
TOKENS += [
    "else",
    "and",
    "not",
    "or",
    "==",
    "x",
    "y",
    "\n  ",
    "img",
    "(img, ",
    "'red'",
    ")",
    "range(",
    "lambda",
    "None",
    "**",
    "~",
]


@given(st.lists(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join) | st.text(max_size=30), max_size=30))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_soup_of_tokens_never_raises_in_the_host(sandbox, programs):
    observations = sandbox.run([(program, BOARD) for program in programs])
    assert len(observations) == len(programs)
    for observation in observations:
        assert observation.text
        assert len(observation.text) <= 200
        assert observation.ok or observation.text.startswith("error: ")


@pytest.mark.timeout(60)
def test_nothing_is_left_of_a_sandbox_even_if_it_is_interrupted():
    before, seen = family(), set()

    def interrupt():
        seen.update(family() - before)
        os.kill(os.getpid(), signal.SIGINT)

    with Sandbox(seconds=30) as sandbox:
        assert sandbox.run([GOOD]) == [ALIVE]
        folder = Path((family() - before).pop().cwd())
        timer = threading.Timer(0.5, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            sandbox.run([(SHARED + "a == b", None)])
        timer.join()
    assert len(seen) == 2, "the keeper and its worker"
    assert family() <= before
    assert not folder.exists()
    wait_for(seen)


def wait_for(processes):
    """Until they have ended: orphans may stay zombies in a container whose first process does not wait for them."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.timeout(60)
def test_a_host_that_is_killed_leaves_no_process(tmp_path):
    code = f"from k25lite.training.sandbox import Sandbox; Sandbox(seconds=60).run([({SHARED + 'a == b'!r}, None)])"
    host = psutil.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    while len(processes := host.children(recursive=True)) < 2:
        time.sleep(0.05)
    host.kill()
    host.wait()
    wait_for(processes)


def test_a_keeper_has_no_secrets_no_folder_of_ours_no_threads_and_no_torch(sandbox):
    keepers = [process for process in family() if "_keep(" in " ".join(process.cmdline())]
    assert keepers
    for keeper in keepers:
        assert "SECRET_KEY" not in keeper.environ()
        assert Path.cwd() not in (Path(keeper.cwd()), *Path(keeper.cwd()).parents)
        assert keeper.num_threads() == 1
        assert not [library.path for library in keeper.memory_maps() if "torch" in library.path]


def test_what_is_wrong_on_the_host_s_side_is_said_there(sandbox, monkeypatch):
    for program in [(3, None), (b"1", None), ("1", 3), ("1", object())]:
        with pytest.raises(TypeError, match="a program is a string"):
            sandbox.run([program])
    for limits in ({"workers": 0}, {"seconds": 0}, {"memory": -1}, {"max_output": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            Sandbox(**limits)
    monkeypatch.setattr(sys, "executable", "false")
    with Sandbox() as broken, pytest.raises(RuntimeError, match="does not start"):
        broken.run([GOOD])
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OSError, match="Linux or macOS"):
        Sandbox()
