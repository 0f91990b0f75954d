"""Which names a source binds in its namespace and which it looks up there, by Python's scoping.

Python's own symtable module is not used: since Python 3.12 it lists the variables of a
comprehension among the names of the module, and leaves out the target of a `:=` inside one.
"""

from __future__ import annotations

import ast
import builtins
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Names:
    """The names of a source.

    binds: names that it binds in its namespace, also from inside a function (`global`).
    reads: every place, at any depth, that looks a name up in the namespace or the builtins; in
           source order.
    What `from m import *` binds is not known: names that it provides are read and not bound.
    """

    binds: frozenset[str]
    reads: tuple[ast.Name, ...]

    @property
    def uses(self) -> frozenset[str]:
        return frozenset(node.id for node in self.reads)

    @property
    def free(self) -> frozenset[str]:
        """Names that have to come from elsewhere."""
        return self.uses - self.binds


@dataclass
class _Scope:
    """kind: "module" | "class" | "function" | "comprehension". outer: None for the module."""

    kind: str
    outer: _Scope | None
    binds: set[str] = field(default_factory=set)
    declared: dict[str, str] = field(default_factory=dict)  # name -> "global" | "nonlocal"

    def bind(self, name: str) -> None:
        declared = self.declared.get(name)
        if declared == "global":
            self.module.binds.add(name)
        elif declared is None:
            self.binds.add(name)

    @property
    def module(self) -> _Scope:
        return self if self.outer is None else self.outer.module

    @property
    def target(self) -> _Scope:
        """The scope in which `:=` binds."""
        return self.outer.target if self.kind == "comprehension" else self

    def looks_up_in_module(self, name: str) -> bool:
        scope = self
        while scope.outer is not None:
            if scope is self or scope.kind != "class":  # a method does not see its class's names
                if name in scope.declared:
                    return scope.declared[name] == "global"
                if name in scope.binds:
                    return (
                        scope.kind == "class"
                    )  # its own names: first in the class, then in the module
            scope = scope.outer
        return True


def names_of(tree: ast.AST) -> Names:
    """The names of a module's tree. It does not recurse: an expression may be thousands deep."""
    module, reads = _Scope("module", None), []
    todo: list[tuple[ast.AST, _Scope]] = [(tree, module)]
    while todo:
        node, scope = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            reads.append((node, scope))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            reads.append((node.target, scope))
        todo += reversed(list(_parts(node, scope)))
    found = (node for node, scope in reads if scope.looks_up_in_module(node.id))
    return Names(frozenset(module.binds), tuple(n for n in found if n.id != "__class__"))


def free_names(source: str) -> set[str]:
    """Names that a source reads and does not bind, builtins included; none if it does not parse."""
    return set(names_of(_parsed(source)).free)


def defined_names(source: str) -> set[str]:
    """Names that a source binds in its namespace; none where it does not parse."""
    return set(names_of(_parsed(source)).binds)


def asks_for_identity(source: str) -> bool:
    """Whether a source compares with `is`, constants and builtins apart."""
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Compare) and any(
            isinstance(o, ast.Is | ast.IsNot) for o in node.ops
        ):
            sides = (node.left, *node.comparators)
            if not any(isinstance(s, ast.Constant) or _is_builtin(s) for s in sides):
                return True
    return False


def _is_builtin(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and hasattr(builtins, node.id)


_FILTERS = threading.Lock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Parse an answer without a word on its escapes; threads share the filters of warnings."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parsed(source: str) -> ast.AST:
    try:
        with without_warnings():
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _parts(node: ast.AST, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    """Bind what the node itself binds; yield its children with the scope of each."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            scope.bind(name)
        case ast.Global(names=names) | ast.Nonlocal(names=names):
            scope.declared |= dict.fromkeys(names, type(node).__name__.lower())
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            for alias in aliases:
                if alias.name != "*":
                    scope.bind(alias.asname or alias.name.split(".")[0])
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            scope.bind(name)
        case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
            scope.bind(name)
        case ast.NamedExpr(target=ast.Name(id=name), value=value):
            scope.target.bind(name)
            yield value, scope
            return
    if isinstance(node, FUNCTIONS):
        yield from _function(node, scope)
    elif isinstance(node, ast.ClassDef):
        yield from _class(node, scope)
    elif isinstance(node, COMPREHENSIONS):
        yield from _comprehension(node, scope)
    elif getattr(node, "type_params", None):  # type X[T] = ...
        scope.bind(node.name.id)
        inner = _type_scope(node, scope)
        yield from ((part, inner) for part in (*node.type_params, node.value))
    else:
        yield from ((child, scope) for child in ast.iter_child_nodes(node))


def _type_scope(node: ast.AST, scope: _Scope) -> _Scope:
    """The scope of annotations and bases: that of the type parameters (Python 3.12), if any."""
    parameters = getattr(node, "type_params", None)
    if not parameters:
        return scope
    return _Scope("function", scope, {parameter.name for parameter in parameters})


def _function(node, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    if isinstance(node, ast.Lambda):
        outside, body = [], [node.body]
    else:
        scope.bind(node.name)
        outside, body = node.decorator_list, node.body
    around = _type_scope(node, scope)
    arguments = [n for n in ast.iter_child_nodes(node.args) if isinstance(n, ast.arg)]
    inside = _Scope("function", around, {argument.arg for argument in arguments})
    defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
    yield from ((part, scope) for part in (*outside, *defaults))
    annotations = [a.annotation for a in arguments] + [getattr(node, "returns", None)]
    typed = [*getattr(node, "type_params", ()), *(a for a in annotations if a is not None)]
    yield from ((part, around) for part in typed)
    yield from ((part, inside) for part in body)


def _class(node: ast.ClassDef, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    scope.bind(node.name)
    around = _type_scope(node, scope)
    inside = _Scope("class", around)
    yield from ((part, scope) for part in node.decorator_list)
    typed = (*getattr(node, "type_params", ()), *node.bases, *node.keywords)
    yield from ((part, around) for part in typed)
    yield from ((part, inside) for part in node.body)


def _comprehension(node, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    """The first iterable is evaluated outside."""
    inside, first = _Scope("comprehension", scope), node.generators[0]
    yield first.iter, scope
    for generator in node.generators:
        yield generator.target, inside
        if generator is not first:
            yield generator.iter, inside
        yield from ((part, inside) for part in generator.ifs)
    elements = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
    yield from ((part, inside) for part in elements)
