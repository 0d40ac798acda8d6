"""What a SavedModel's graph can run: who calls which function, what reaches what, where a file name comes from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

CALLS = ("PartitionedCall", "StatefulPartitionedCall")


class Scope:
    """The main graph, or the body of one function.

    Args:
        name: The function's name; "" for the main graph.
        nodes: Its nodes.
        arguments: Names of the function's arguments, in order.

    Raises:
        ValueError: Where two nodes or arguments have one name.
    """

    def __init__(self, name: str, nodes: Iterable[Any], arguments: Iterable[str] = ()):
        self.name = name
        self.arguments = {argument: index for index, argument in enumerate(arguments)}
        self.nodes: dict[str, Any] = {}
        for node in nodes:
            if node.name in self.nodes or node.name in self.arguments:
                raise ValueError(f"two nodes are called {node.name!r}")
            self.nodes[node.name] = node

    def label(self) -> str:
        return f"the function {self.name!r}" if self.name else "the graph"


class Program:
    """Graph and functions of one MetaGraph, with the questions that the gate asks.

    Args:
        meta: A parsed `MetaGraph`.

    Raises:
        ValueError: Where names are not unique, or a function is called that is not there.
    """

    def __init__(self, meta: Any):
        self.main = Scope("", meta.graph.nodes)
        self.functions: dict[str, Scope] = {}
        for function in meta.graph.library.functions:
            name = function.signature.name
            if name in self.functions:
                raise ValueError(f"two functions are called {name!r}")
            self.functions[name] = Scope(
                name, function.nodes, [argument.name for argument in function.signature.arguments]
            )
        self.bound = {entry.key: list(entry.value.bound_inputs) for entry in meta.objects.functions}
        self.callers: dict[str, list[tuple[Scope, Any]]] = {}
        for scope in self.scopes():
            for node in scope.nodes.values():
                for name in self.called(node):
                    if name not in self.functions:
                        raise ValueError(f"{scope.label()} calls the function {name!r}, which is not there")
                    self.callers.setdefault(name, []).append((scope, node))

    def scopes(self) -> Iterator[Scope]:
        yield self.main
        yield from self.functions.values()

    def called(self, node: Any) -> set[str]:
        """Functions that `node` may call: as its op, or named in an attribute."""
        names = {node.op} if node.op in self.functions else set()
        return names | set(_callees(node.attributes))

    def main_nodes(self, roots: Iterable[str]) -> set[str]:
        """Names of the main graph's nodes that computing `roots` (nodes or tensors) runs."""
        reached: set[str] = set()
        stack = [node_of(root) for root in roots]
        while stack:
            name = stack.pop()
            if name in reached or name not in self.main.nodes:
                continue
            reached.add(name)
            stack += [node_of(tensor) for tensor in self.main.nodes[name].inputs]
        return reached

    def functions_of(self, main_nodes: Iterable[str], functions: Iterable[str] = ()) -> set[str]:
        """Functions that these nodes of the main graph and these functions can call, themselves included."""
        stack = [name for node in main_nodes for name in self.called(self.main.nodes[node])]
        stack += [name for name in functions if name in self.functions]
        reached: set[str] = set()
        while stack:
            name = stack.pop()
            if name not in reached:
                reached.add(name)
                stack += [more for node in self.functions[name].nodes.values() for more in self.called(node)]
        return reached


class NameTrace:
    """Follows the file name that an op uses back to where it comes from.

    Args:
        program: The graph.
        through: Ops that hand a name on, and a function of their inputs: those to follow further.
        accepts: Whether a tensor of the main graph, (node, output), is a good source.
        accepts_bound: Whether an object of the object graph, by its number, is a good source.
    """

    def __init__(
        self,
        program: Program,
        *,
        through: Mapping[str, Callable[["NameTrace", Scope, Any], Iterator[str]]],
        accepts: Callable[[str, int], bool],
        accepts_bound: Callable[[int], bool],
    ):
        self.program, self.through, self.accepts, self.accepts_bound = program, through, accepts, accepts_bound

    def problem(self, scope: Scope, tensor: str) -> str:
        """What is wrong with the source of `tensor`, or ''."""
        seen: set[tuple[str, str]] = set()
        stack = [(scope, tensor)]
        while stack:
            scope, tensor = stack.pop()
            if (scope.name, tensor) in seen:
                continue
            seen.add((scope.name, tensor))
            name, output = node_of(tensor), output_of(tensor)
            if name in scope.arguments:
                more, problem = self._callers(scope, scope.arguments[name])
                if problem:
                    return problem
                stack += more
                continue
            if not scope.name and self.accepts(name, output):
                continue
            node = scope.nodes.get(name)
            if node is None or node.op not in self.through:
                return f"comes from the op {node.op if node is not None else 'of no node'}"
            found = list(self.through[node.op](self, scope, node))
            if not found:
                return f"comes from the op {node.op}"
            stack += [(scope, more) for more in found]
        return ""

    def _callers(self, scope: Scope, index: int) -> tuple[list[tuple[Scope, str]], str]:
        """What callers pass for argument `index`; or what is wrong with one of them."""
        found = []
        for caller, node in self.program.callers.get(scope.name, ()):
            inputs = data_inputs(node)
            if (node.op not in CALLS and node.op != scope.name) or index >= len(inputs):
                return [], f"is passed on by the op {node.op}"
            found.append((caller, inputs[index]))
        bound = self.program.bound.get(scope.name)
        if bound is not None:
            place = index - (len(scope.arguments) - len(bound))
            if place < 0 or not self.accepts_bound(bound[place]):
                return [], "is given by the caller"
        return found, ""


def first_input(_: NameTrace, __: Scope, node: Any) -> Iterator[str]:
    """Through ops that hand on their first input."""
    yield from data_inputs(node)[:1]


def every_input(_: NameTrace, __: Scope, node: Any) -> Iterator[str]:
    """Through ops that hand on any of their inputs."""
    yield from data_inputs(node)


def joined(_: NameTrace, scope: Scope, node: Any) -> Iterator[str]:
    """Through StringJoin: its first piece, where the others are literal and cannot climb out of the folder."""
    inputs = data_inputs(node)
    separator = text_attribute(node, "separator")
    if b".." not in separator and all(_is_plain_piece(scope, piece, 0) for piece in inputs[1:]):
        yield from inputs[:1]


def read_variable(trace: NameTrace, scope: Scope, node: Any) -> Iterator[str]:
    """Through a variable of the main graph: to everything that is assigned to it, if nothing else can touch it."""
    if scope.name:
        return
    handle = data_inputs(node)[0] if data_inputs(node) else ""
    nodes = trace.program.main.nodes
    variable = nodes.get(node_of(handle))
    if variable is None or variable.op != "VarHandleOp" or _has_alias(variable, trace.program):
        return
    assigned = []
    for user in nodes.values():
        inputs = data_inputs(user)
        if not any(node_of(tensor) == variable.name for tensor in inputs):
            continue
        if user.op == "AssignVariableOp" and len(inputs) > 1:
            assigned.append(inputs[1])
        elif user.op not in ("ReadVariableOp", "VarIsInitializedOp"):
            return
    yield from assigned


def _has_alias(variable: Any, program: Program) -> bool:
    """Whether another handle names the same variable."""

    def shared(node: Any) -> bytes:
        return text_attribute(node, "shared_name") or node.name.encode()

    return any(
        node is not variable and node.op == "VarHandleOp" and shared(node) == shared(variable)
        for scope in program.scopes()
        for node in scope.nodes.values()
    )


def _is_plain_piece(scope: Scope, tensor: str, depth: int) -> bool:
    """Whether a text is literal, without '..', here or chosen among such."""
    node = scope.nodes.get(node_of(tensor))
    if node is None or depth > 8:
        return False
    if node.op == "Const":
        texts = [text for entry in node.attributes if entry.key == "value" for text in entry.value.tensor.texts]
        return all(b".." not in text for text in texts)
    pieces = {"Select": 1, "SelectV2": 1, "Identity": 0}.get(node.op)
    return pieces is not None and all(_is_plain_piece(scope, piece, depth + 1) for piece in data_inputs(node)[pieces:])


def node_of(tensor: str) -> str:
    """The node of a tensor's or control input's name.

    Example:
        >>> node_of("^a/b"), node_of("a:1"), node_of("a:output:0")
        ('a/b', 'a', 'a')
    """
    return tensor.removeprefix("^").partition(":")[0]


def output_of(tensor: str) -> int:
    """Which output of its node a tensor is.

    Example:
        >>> output_of("a"), output_of("a:1"), output_of("a:output:2")
        (0, 1, 2)
    """
    last = tensor.rpartition(":")[2]
    return int(last) if last.isdecimal() and ":" in tensor else 0


def data_inputs(node: Any) -> list[str]:
    """The inputs of a node that carry values."""
    return [tensor for tensor in node.inputs if not tensor.startswith("^")]


def text_attribute(node: Any, key: str) -> bytes:
    """The last value of a text attribute, which is the one that counts; b'' where it is absent."""
    return next((bytes(entry.value.text) for entry in reversed(node.attributes) if entry.key == key), b"")


def _callees(attributes: Iterable[Any]) -> Iterator[str]:
    """Functions that attributes name, at any depth."""
    for entry in attributes:
        value = entry.value
        found: list[Message] = [value.function] if value.HasField("function") else []
        for callee in (*found, *value.items.functions):
            yield callee.name  # type: ignore[attr-defined]
            yield from _callees(callee.attributes)  # type: ignore[attr-defined]
