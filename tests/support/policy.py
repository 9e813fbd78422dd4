"""A MutatingAdmissionPolicy of JSON patches, applied as by an API server: selectors, conditions, variables, CEL, patch.

The expressions are evaluated by a CEL implementation that knows no object types. `plain` turns `Object.spec.x{a: 1}`
into a map, and checks on the way what Kubernetes checks: that a type's name is the path at which the object stands.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import cel

_TOKEN = re.compile(r"""\s+|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[A-Za-z_][\w.]*|\d+|[^\s\w]""")
_TYPE = re.compile(r"(?:JSONPatch|Object(?:\.\w+)*)")


class TypeMismatch(AssertionError):
    """A type's name is not the path of the object."""


class ServerPanic(AssertionError):
    """An API server panics over this patch: no pod is created, whatever `failurePolicy` says."""


def admit(policy: dict[str, Any], pod: dict[str, Any], namespace: str) -> dict[str, Any]:
    """The pod as it is stored: mutated if the policy matches it."""
    spec = policy["spec"]
    constraints = spec["matchConstraints"]
    name = {"kubernetes.io/metadata.name": namespace}
    labels = pod.get("metadata", {}).get("labels", {})
    if not _selected(constraints["namespaceSelector"], name) or not _selected(constraints["objectSelector"], labels):
        return pod
    if not all(_evaluate(condition["expression"], {"object": pod}) for condition in spec["matchConditions"]):
        return pod
    for mutation in spec["mutations"]:
        variables: dict[str, Any] = {}
        for variable in spec.get("variables", []):
            variables[variable["name"]] = _evaluate(variable["expression"], {"object": pod, "variables": variables})
        patch = _evaluate(mutation["jsonPatch"]["expression"], {"object": pod, "variables": variables})
        pod = _apply(patch, pod)
    return pod


def plain(expression: str) -> str:
    """The expression with maps in place of typed objects. Raises `TypeMismatch` and `ServerPanic`."""
    out: list[str] = []
    braces: list[str | None] = []
    field, tokens = "", _TOKEN.findall(expression)
    path: list[str] = []
    for at, token in enumerate(tokens):
        following = next((t for t in tokens[at + 1 :] if not t.isspace()), "")
        if _TYPE.fullmatch(token) and following == "{":
            inside = [brace for brace in braces if brace and brace != "JSONPatch"]
            if inside and token != f"{inside[-1]}.{path[-1]}":
                raise TypeMismatch(f"{token} stands at {inside[-1]}.{path[-1]}")
            if out and _significant(out)[-3:] == ['"value"', ":", "["]:
                # CEL converts a list to JSON element by element, and a typed object only knows how to become a map.
                raise ServerPanic(f"a list of {token} is the value of a patch")
            field = token
        elif token == "{":
            braces.append(field or None)
            path.append("")
            field = ""
            out.append(token)
        elif token == "}":
            braces.pop()
            path.pop()
            out.append(token)
        elif braces and braces[-1] and following == ":" and re.fullmatch(r"\w+", token):
            path[-1] = token
            # Kubernetes' objects take values of all types; a map's are of one.
            out.append(f'"{token}"')
        else:
            out.append(token)
    return "".join(out)


def _significant(tokens: list[str]) -> list[str]:
    return [token for token in tokens if not token.isspace()]


def _evaluate(expression: str, variables: dict[str, Any]) -> Any:
    context = cel.Context()
    for name, value in variables.items():
        context.add_variable(name, value)
    context.add_function("indexOf", lambda items, item: items.index(item) if item in items else -1)
    context.add_function(
        "lastIndexOf", lambda items, item: max((at for at, i in enumerate(items) if i == item), default=-1)
    )
    return cel.evaluate(plain(expression), context)


def _selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for expression in selector["matchExpressions"]:
        found = labels.get(expression["key"]) in expression["values"]
        if found != (expression["operator"] == "In"):
            return False
    return True


def _apply(patch: list[dict[str, Any]], target: dict[str, Any]) -> dict[str, Any]:
    """Apply RFC 6902's add, remove, replace and copy. Raises `ServerPanic` for a path whose parent is missing."""
    target = copy.deepcopy(target)
    for operation in patch:
        parent, key = _resolve(target, operation["path"])
        present = (key < len(parent)) if isinstance(parent, list) else key in parent
        if operation["op"] != "add" and operation["op"] != "copy":
            assert present, operation["path"]
        if operation["op"] == "remove":
            del parent[key]
            continue
        value = copy.deepcopy(operation.get("value"))
        if operation["op"] == "copy":
            source, at = _resolve(target, operation["from"])
            value = copy.deepcopy(source[at])
        if isinstance(parent, list) and operation["op"] != "replace":
            assert key <= len(parent), operation["path"]
            parent.insert(key, value)
        else:
            parent[key] = value
    return target


def _resolve(target: dict[str, Any], path: str) -> tuple[Any, Any]:
    """Return the list or map that holds what a JSON pointer names, and its index or key there."""
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    parent: Any = target
    for part in above:
        try:
            parent = parent[int(part)] if isinstance(parent, list) else parent[part]
        except (KeyError, IndexError):
            raise ServerPanic(f"{path}: nothing is at {part}") from None
    return parent, int(last) if isinstance(parent, list) else last
