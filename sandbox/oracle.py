"""Strict mode, in two fresh interpreters: an oracle with the candidate, a checker with the tests.

The checker sends requests, the oracle replies; only data passes between them:
    ["look", names]                ["v", {name: "missing" | "callable" | reply}]
    ["call", name, args, kwargs]   ["v", value]           the function returned data
                                   ["a", n]               it returned its n-th argument, unchanged
                                   ["o", class, truth, honest]    an object that is not data;
                                        honest: its class is not the candidate's
                                   ["e", classes, text, args]     it raised
                                   ["n", why]             the value cannot be sent
Expected values never leave the checker. From the candidate it receives only data: an object that
equals everything arrives without its class, and the frames, pipes and builtins of the tests are in
another process.
What cannot be carried (attributes of a named tuple, an exception class of the candidate's own) is
left out, and tests that need it end as unverifiable.
A message is four bytes of length, then JSON. Values are tagged lists of builtin types; no pickle.
"""

import builtins
import json
import os
import sys

from child import TOKEN, read_exactly, reason_of, text_of

MAX_BYTES, MAX_DEPTH, MAX_ITEMS = 16 << 20, 60, 100_000


# tag -> type of the values that have it
BASES = {"s": str, "i": int, "f": float, "c": complex, "b": bytes, "B": bytearray}
BASES |= {"l": list, "t": tuple, "S": set, "z": frozenset, "d": dict}
HEAP_TYPE = 1 << 9  # flag of classes that are made by a class statement


class NotData(Exception):
    """A value that cannot be sent."""


# ---------------------------------------------------------------- values


def encode(value, depth=0):
    """A value as lists for JSON; ["x", class, value] for a subclass of a type. Raises NotData."""
    sent, kind = _encode(value, depth), type(value)
    derived = isinstance(sent, list) and sent[0] in BASES and kind is not BASES[sent[0]]
    return ["x", kind.__name__, sent] if derived else sent


def _encode(value, depth):
    if depth > MAX_DEPTH:
        raise NotData(f"nested more than {MAX_DEPTH} deep")
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if isinstance(value, str):
        return ["s", str.encode(value, "utf-8", "surrogatepass").decode("utf-8", "surrogatepass")]
    if isinstance(value, int):
        return ["i", int.__format__(value, "x")]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        value = complex.__complex__(value)
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "B", bytes(value).hex()]
    special = _special(kind, value, depth)
    if special is not None:
        return special
    for tag, base in (("l", list), ("t", tuple), ("S", set), ("z", frozenset)):
        if isinstance(value, base):
            return [tag, [encode(v, depth + 1) for v in base.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", _pairs(value, depth)]
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return ["T", value.__name__]
    if isinstance(value, range):
        return ["r", *(encode(v) for v in (value.start, value.stop, value.step))]
    raise NotData(f"an object of class {kind.__name__}")


def _pairs(value, depth):
    return [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]


def _special(kind, value, depth):
    """Classes of the standard library that compare equal to builtin ones, and numpy's scalars."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in ("collections.Counter", "collections.OrderedDict", "collections.defaultdict"):
        return ["D", kind.__name__, _pairs(value, depth)]
    if name == "collections.deque":
        return ["q", [encode(v, depth + 1) for v in value], encode(value.maxlen)]
    if name in ("fractions.Fraction", "decimal.Decimal"):
        return ["n", kind.__name__, str(value)]
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), depth + 1)
    if name in ("builtins.dict_keys", "builtins.dict_items"):
        return ["v", [encode(v, depth + 1) for v in value]]  # sets compare and iterate as they do
    if hasattr(kind, "__next__"):
        items = []
        for item in value:
            if len(items) == MAX_ITEMS:
                raise NotData(f"an iterator of more than {MAX_ITEMS} items")
            items.append(encode(item, depth + 1))
        return ["I", items]
    return None


def decode(sent):
    """The value that encode() was given. Other input raises ValueError, TypeError, KeyError, ..."""
    if sent is None or sent is True or sent is False:
        return sent
    tag, *parts = sent
    if tag in ("l", "t", "S", "z", "I", "v"):
        kind = {"I": iter, "v": set}.get(tag) or BASES[tag]
        return kind([decode(v) for v in parts[0]])
    if tag == "d":
        return {decode(k): decode(v) for k, v in parts[0]}
    if tag == "x":
        return _derived(BASES[parts[1][0]], str(parts[0]))(decode(parts[1]))
    if tag in ("D", "q", "n"):
        return _decode_special(tag, *parts)
    simple = {
        "T": lambda name: {n: t for n, t in vars(builtins).items() if isinstance(t, type)}[name],
        "s": lambda text: "".join([text]),
        "i": lambda text: int(text, 16),
        "f": float.fromhex,
        "c": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
        "b": bytes.fromhex,
        "B": bytearray.fromhex,
        "r": lambda *ends: range(*map(decode, ends)),
    }
    return simple[tag](*parts)


def _decode_special(tag, first, second):
    import collections

    if tag == "q":
        return collections.deque([decode(v) for v in first], decode(second))
    if tag == "n":
        module = __import__({"Fraction": "fractions", "Decimal": "decimal"}[first])
        return getattr(module, first)(second)
    pairs = [(decode(k), decode(v)) for k, v in second]
    kinds = {
        "Counter": lambda: collections.Counter(dict(pairs)),
        "OrderedDict": lambda: collections.OrderedDict(pairs),
        "defaultdict": lambda: collections.defaultdict(None, pairs),
    }
    return kinds[first]()


# ---------------------------------------------------------------- messages


def send(fd, message, write=os.write):
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise NotData(f"more than {MAX_BYTES >> 20} MiB")
    body = memoryview(len(body).to_bytes(4, "little") + body)
    while body:
        body = body[write(fd, body) :]


def receive(fd):
    size = int.from_bytes(read_exactly(fd, 4), "little")
    if size > MAX_BYTES:
        raise ValueError("message too long")
    return json.loads(read_exactly(fd, size))


# ---------------------------------------------------------------- the oracle


def run_oracle(job, verdict, token_fd, requests, replies):
    """Execute the candidate, then answer requests until the checker ends."""
    os.close(token_fd)
    # local names: the program cannot replace them by rebinding names in modules
    answer, next_request, leave, run = send, receive, os._exit, exec
    namespace = {}
    try:
        program = compile(job["candidate"], "<candidate>", "exec", dont_inherit=True)
    except BaseException as error:
        answer(replies, ["F", "syntax", text_of(error).decode()])
        leave(0)
    try:
        run(program, namespace)
    except BaseException as error:
        answer(replies, ["F", reason_of(error).decode(), text_of(error).decode()])
        leave(0)
    answer(replies, ["ready"])
    while True:
        try:
            request = next_request(requests)
        except EOFError:
            leave(0)
        for reply in (_reply(request, namespace), ["n", "a value too large to be sent"]):
            try:
                answer(replies, reply)
                break
            except NotData:
                continue


def _reply(request, namespace):
    try:
        if request[0] == "look":
            return ["v", encode({name: _kind(name, namespace) for name in request[1]})]
        _, name, args, kwargs = request
        values = decode(args)
        found = namespace[name](*values, **decode(kwargs))
        for n, value in enumerate(values):
            if found is value and isinstance(found, list | dict | set | bytearray):
                if encode(found) == args[1][n]:  # not changed
                    return ["a", n]
        return _sent(found)
    except BaseException as error:
        classes = [[c.__module__, c.__qualname__] for c in type(error).__mro__[:-1]]
        return ["e", classes, text_of(error).decode(), _args_of(error)]


def _args_of(error):
    """The arguments of an exception; None where they are no data."""
    try:
        return encode(tuple(error.args))
    except BaseException:
        return None


def _kind(name, namespace):
    if name not in namespace:
        return "missing"
    if callable(namespace[name]):
        return "callable"
    return _sent(namespace[name])


def _sent(value):
    try:
        return ["v", encode(value)]
    except NotData as error:
        opaque = not isinstance(value, list | tuple | dict | set | frozenset) and not hasattr(
            type(value), "__next__"
        )
        return ["o", *_opaque(value)] if opaque else ["n", str(error)]


def _opaque(value):
    """Class, truth, and whether the class is a library's: only one of the candidate's can lie."""
    kind = type(value)
    try:
        truth = bool(value)
    except BaseException:  # of an array
        truth = None
    known = getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
    return kind.__name__, truth, known or not kind.__flags__ & HEAP_TYPE


# ---------------------------------------------------------------- the checker


class Stop(BaseException):
    """Ends the check with a reason and a detail."""

    over = None  # the first one raised: it counts even where the tests catch it
    lost = None  # what has arrived without its class: tests that fail then are unverifiable

    def __init__(self, reason, detail):
        super().__init__(reason, detail)
        Stop.over = Stop.over or (reason, detail)


class Opaque:
    """Stands for an object that is not data. It has a truth value; any other use ends the check."""

    def __init__(self, kind, truth, honest):
        object.__setattr__(self, "_seen", (kind, truth, honest))

    def __bool__(self):
        return self._used() if self._seen[1] is None else self._seen[1] is True

    def _compared(self, _other):
        kind, _, honest = self._seen
        reason = "unverifiable" if honest is True else "opaque"
        raise Stop(reason, f"an object of class {kind} was compared; it is not data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compared

    def _used(self, *_args):
        raise Stop(
            "unverifiable", f"the tests use an object of class {self._seen[0]}, which is not data"
        )

    __hash__ = __len__ = __iter__ = __call__ = __getitem__ = __contains__ = __setattr__ = (
        __getattr__
    ) = _used


class Proxy:
    """Stands for a function of the candidate. A call is a request to the oracle."""

    def __init__(self, name, ask):
        object.__setattr__(self, "_target", (name, ask))

    def __call__(self, *args, **kwargs):
        name, ask = self._target
        try:
            request = ["call", name, encode(args), encode(kwargs)]
        except NotData as error:
            raise Stop("unverifiable", f"{name} is called with {error}") from None
        reply = ask(request)
        match reply:
            case ["a", int(n)] if 0 <= n < len(args):
                return args[n]
        return _value(reply)

    def __instancecheck__(self, _value):
        raise Stop("unverifiable", f"the tests ask for the class {self._target[0]}")

    __subclasscheck__ = __instancecheck__

    def __getattr__(self, attribute):
        raise Stop("unverifiable", f"the tests use {self._target[0]}.{attribute}")

    def __setattr__(self, attribute, _value):
        raise Stop("unverifiable", f"the tests set {self._target[0]}.{attribute}")


def _value(reply):
    """The value in a reply. Raises what the candidate raised, and Stop if there is no value."""
    try:
        tag, *parts = reply
        if tag == "v":
            return decode(*parts)
        if tag == "o":
            return Opaque(str(parts[0])[:100], *parts[1:])
        if tag == "n":
            raise Stop("unverifiable", str(parts[0])[:200])
        assert tag == "e"
        error = _exception(*parts)
    except Stop:
        raise
    except Exception as error:
        raise Stop("protocol", f"malformed reply: {type(error).__name__}") from None
    raise error


def _exception(classes, text, args):
    """An exception of the first of the classes that exists here too: Python's or a library's."""
    args = (str(text),) if args is None else tuple(decode(args))
    for n, (module, name) in enumerate(classes):
        kind = getattr(sys.modules.get(module), name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)) or kind is Stop:
            continue
        if n > 0:
            Stop.lost = f"an exception of class {str(classes[0][1])[:100]} was raised"
        try:
            if module == "builtins":
                return kind(*args)
            derived = _derived(kind, kind.__name__)  # its __init__ may do anything: it is not run
            return BaseException.__new__(derived, *args)
        except TypeError:  # other arguments: a class above it
            continue
    raise ValueError("no class")


def _derived(base, name):
    """A subclass that stands for one with more attributes: using one of those ends the check."""

    def used(_self, attribute):
        raise Stop("unverifiable", f"the tests use .{attribute} of an object of class {name}")

    return type(name, (base,), {"__getattr__": used})


def run_checker(job, verdict, token_fd, requests, replies):
    """Execute the tests; the names that the candidate provides are in the oracle."""

    def ask(request):
        try:
            send(requests, request)
            return receive(replies)
        except NotData as error:
            raise Stop("unverifiable", f"arguments of {error}") from None
        except EOFError:
            raise Stop("gone", "the candidate's process ended") from None
        except (ValueError, OSError, RecursionError) as error:
            reason = "gone" if isinstance(error, BrokenPipeError) else "protocol"
            raise Stop(reason, f"no reply: {type(error).__name__}") from None

    def end(message):
        os.write(verdict, message)
        os._exit(0)

    namespace = job["namespace"]
    if job["identity"]:
        Stop.lost = "the tests ask whether two objects are the same"
    try:
        _wait_for_candidate(replies)
        found = _value(ask(["look", job["names"]]))
        for name in job["names"]:
            namespace.pop(name, None)
            if found[name] == "callable":
                namespace[name] = Proxy(name, ask)
            elif found[name] != "missing":
                namespace[name] = _value(found[name])
        exec(job["tests"], namespace)
    except BaseException as error:
        outcome = (reason_of(error), text_of(error))
    else:
        outcome = None
    if outcome is not None and outcome[0] in (b"assertion", b"exception") and Stop.lost:
        outcome = (b"unverifiable", Stop.lost.encode("utf-8", "backslashreplace"))
    if Stop.over is not None:
        outcome = tuple(part.encode("utf-8", "backslashreplace") for part in Stop.over)
    if outcome is not None:
        end(b"F" + outcome[0] + b"\n" + outcome[1])
    end(b"P" + read_exactly(token_fd, TOKEN))


def _wait_for_candidate(replies):
    """Wait until the oracle has executed the candidate. Raises Stop where that failed."""
    try:
        message = receive(replies)
    except EOFError:
        raise Stop("gone", "the candidate's process ended before it was loaded") from None
    except (ValueError, RecursionError):
        message = None
    match message:
        case ["ready"]:
            return
        case ["F", "syntax" | "assertion" | "exception" | "memory" | "files" as reason, detail]:
            raise Stop(reason, str(detail)[:600])
    raise Stop("protocol", "malformed first message of the candidate's process")
