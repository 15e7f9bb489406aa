"""Finds the chains convolution -> batch norm (-> activation) of a model, by tracing forwards symbolically.

A chain counts when, in every call that tracing sees, the convolution's output goes to the norm and nowhere else, and
the norm's output to the activation and nowhere else. The module whose forward makes all these calls, itself or through
modules inside it, owns the chain.

Real forwards often cannot be traced as a whole (they branch on sizes, or loop over a tensor). A module whose forward
fails is therefore taken as one opaque step of its caller, and then traced by itself; when that fails as well, its
children are.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import itertools
import types
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.fx

from fastseg.nn.folding import Chain, activation_name, has_foreign_hooks, original_class, own_activation

Link = tuple[torch.nn.Module, str, torch.nn.Module]


class FoundChain(NamedTuple):
    """A chain, its owner, and the modules from the owner down to its members as (parent, name, module)."""

    owner: torch.nn.Module
    chain: Chain
    watched: list[Link]


class _Candidate(NamedTuple):
    norm: torch.nn.Module
    activation: torch.nn.Module | None
    activation_name: str
    identities: tuple[torch.nn.Module, ...]
    owner: torch.nn.Module


def find_chains(model: torch.nn.Module) -> dict[torch.nn.Conv2d, FoundChain]:
    """The chain that follows each plain convolution of `model`, where there is one."""
    followers: dict[torch.nn.Conv2d, set[_Candidate | None]] = {}
    pending, done = [model], set()
    with undisturbed(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while pending:
            root = pending.pop()
            if root in done:
                continue
            done.add(root)
            traces = _trace(root)
            pending.extend(root.children() if traces is None else (m for t in traces for m in t.opaque))
            for tracer in traces or ():
                for convolution, candidate in tracer.candidates():
                    followers.setdefault(convolution, set()).add(candidate)
    found = {}
    for convolution, candidates in followers.items():
        (candidate, *others) = candidates
        if candidate is None or others:
            continue
        watched = _watch(candidate, convolution)
        if watched is not None:
            chain = Chain(candidate.norm, candidate.activation, candidate.activation_name)
            found[convolution] = FoundChain(candidate.owner, chain, watched)
    return found


def _trace(root: torch.nn.Module) -> list[_Tracer] | None:
    """Traces of `root`'s forward, or None when it cannot be traced.

    Arguments with defaults are traced as given and as left out, because a forward branches on `is None`.
    """
    if not _traceable(root):
        return None
    parameters = inspect.signature(type(root).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    traces = []
    for concrete in [None, defaults] if defaults else [None]:
        tracer = _Tracer(root)
        try:
            tracer.trace(root, concrete)
        except Exception:  # whatever a stranger's forward raises on symbolic values
            return None
        tracer.kept = _kept(root)
        traces.append(tracer)
    return traces


def _traceable(module: torch.nn.Module) -> bool:
    """Whether to look inside `module`'s forward: torch's own (DistributedDataParallel, say) is never run on symbols."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return False
    if not isinstance(type(module).forward, types.FunctionType):
        return False
    ours = isinstance(module, (torch.nn.Sequential, torch.fx.GraphModule))
    return ours or type(module).__module__.partition(".")[0] != "torch"


class _Tracer(torch.fx.Tracer):
    """Records each call of a leaf module with the stack of calls around it."""

    proxy_buffer_attributes = True  # an update of a buffer in forward must not happen

    def __init__(self, root: torch.nn.Module):
        super().__init__()
        self.ids = itertools.count()
        self.stack = [(next(self.ids), root)]
        self.calls: dict[torch.fx.Node, tuple[torch.nn.Module, tuple]] = {}
        self.opaque: list[torch.nn.Module] = []
        self.kept: set[torch.fx.Node] = set()

    def is_leaf_module(self, module, name):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.modules.batchnorm._BatchNorm)):
            return True
        return not any(module.children()) or has_foreign_hooks(module) or not _traceable(module)

    def call_module(self, module, forward, args, kwargs):
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return self._leaf(module, name, args, kwargs)
        newest = next(iter(reversed(self.graph.nodes)))
        self.stack.append((next(self.ids), module))
        try:
            return module.forward(*args, **kwargs)  # not __call__: hooks are for real calls
        except Exception:
            for node in reversed(self.graph.nodes):
                if node is newest:
                    break
                self.graph.erase_node(node)
        finally:
            self.stack.pop()
        return self._leaf(module, name, args, kwargs)

    def _leaf(self, module, name, args, kwargs):
        proxy = self.create_proxy("call_module", name, args, kwargs)
        self.calls[proxy.node] = (module, tuple(self.stack))
        if any(module.children()):
            self.opaque.append(module)
        return proxy

    def candidates(self) -> Iterator[tuple[torch.nn.Conv2d, _Candidate | None]]:
        """Each call of a plain convolution with what follows it, None where that is no chain."""
        for node in self.graph.nodes:
            module, stack = self.calls.get(node, (None, None))
            if module is not None and original_class(module) is torch.nn.Conv2d:
                yield module, self._follow(node, stack)

    def _follow(self, node, stack) -> _Candidate | None:
        node, norm, stack, identities = self._next(node, stack)
        name = None if norm is None else own_activation(norm)
        if name is None:
            return None
        activation = None
        if name == "none":
            _, follower, wider, between = self._next(node, stack)
            if follower is not None and activation_name(follower) is not None:
                activation, name = follower, activation_name(follower)
                stack, identities = wider, identities + between
        return _Candidate(norm, activation, name, identities, stack[-1][1])

    def _next(self, node, stack):
        """The only user of `node`, if it is a call of a module: its node, module, the calls around both, identities."""
        identities = ()
        while True:
            user = next(iter(node.users), None)
            alone = len(node.users) == 1 and node not in self.kept
            if not alone or user not in self.calls or user.args != (node,) or user.kwargs:
                return None, None, stack, ()
            module, around = self.calls[user]
            stack = tuple(ours for ours, theirs in zip(stack, around, strict=False) if ours[0] == theirs[0])
            if type(module) is not torch.nn.Identity:
                return user, module, stack, identities
            node, identities = user, (*identities, module)


def _watch(candidate: _Candidate, convolution: torch.nn.Conv2d) -> list[Link] | None:
    """The links from the owner down to every member, or None when one is not inside the owner."""
    owner = candidate.owner
    paths = {module: path for path, module in owner.named_modules()}
    members = [convolution, candidate.norm, *candidate.norm.children(), *candidate.identities]
    if candidate.activation is not None:
        members.append(candidate.activation)
    links = {}
    for member in members:
        if member not in paths:
            return None
        parent = owner
        for name in paths[member].split("."):
            module = parent._modules[name]
            links[parent, name] = (parent, name, module)
            parent = module
    return list(links.values())


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for every module inside; afterwards every attribute and the random state are as before."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    saved = [None if isinstance(m, torch.jit.ScriptModule) else _Saved(vars(m)) for m in modules]
    try:
        for module in modules:
            module.training = False
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, flag, attributes in zip(modules, flags, saved, strict=True):
            module.training = flag
            if attributes is not None:
                attributes.restore()


class _Saved:
    """A module's attributes, with the contents of lists, dicts and sets: a forward may append what it computes."""

    def __init__(self, attributes: dict):
        self.attributes = attributes
        self.values = attributes.copy()
        self.contents = [(value, value.copy()) for value in self.values.values() if type(value) in _CONTAINERS]

    def restore(self) -> None:
        for container, contents in [*self.contents, (self.attributes, self.values)]:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)


_CONTAINERS = (list, dict, set, collections.OrderedDict)


def _kept(root: torch.nn.Module) -> set[torch.fx.Node]:
    """The traced values that a forward keeps in a module's attributes, where the graph does not show them."""
    values = [value for module in root.modules() for value in vars(module).values()]
    for value in values[:]:
        if type(value) in (*_CONTAINERS, tuple):
            values.extend(value.values() if isinstance(value, dict) else value)
    return {value.node for value in values if isinstance(value, torch.fx.Proxy)}
