"""RR-M against a dense version in NumPy that looks at every slot at every batch, and the paper's invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resprout.replay import masked, prioritized
from resprout.replay.masked import DRAWABLE, MASK, PRIORITY, draw_debt, with_current_masks


class Dense:
    """arXiv 2503.02269, RR-M, in double precision; told which slots were drawn."""

    def __init__(self, capacity):
        self.priority = np.zeros(capacity)
        self.drawn = np.zeros(capacity)
        self.expected = np.zeros(capacity)
        self.highest = 1.0

    def add(self, slots):
        for slot in slots:
            self.priority[slot] = self.highest
            if self.expected[slot] > 0:
                self.drawn[slot] = self.expected[slot] = 0
                if self.expected.sum() > 0:
                    self.expected *= self.drawn.sum() / self.expected.sum()

    def masks(self):
        return self.drawn > self.expected + 1e-9

    def sampled(self, slots):
        self.expected += self.priority * len(slots) / self.priority.sum()
        np.add.at(self.drawn, slots, 1)

    def update(self, slots, priorities):
        values = np.maximum(np.abs(priorities), 0.01) ** 0.6
        self.highest = max(self.highest, values.max())
        self.priority[slots] = values


def masks(state, capacity):
    """Before the next batch: what `sample` would find."""
    leaves = np.asarray(state.tree[0])[:capacity]
    return leaves[:, DRAWABLE] < leaves[:, PRIORITY]


def debts(state, capacity):
    return np.asarray(draw_debt(state))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def run(sampler, state, batches, batch_size, seen=lambda state, slots: None):
    sample = jax.jit(sampler.sample, static_argnums=1)
    for _ in range(batches):
        state, slots, _ = sample(state, batch_size)
        seen(state, np.asarray(slots))
    return state


def filled(sampler, capacity, seed=0, priorities=None):
    state = sampler.add(sampler.init(jax.random.key(seed)), jnp.arange(capacity, dtype=jnp.int32))
    return state if priorities is None else sampler.update(state, jnp.arange(capacity), jnp.asarray(priorities))



def test_trace(double):
    capacity=64; B=8; r=np.random.default_rng(0)
    sampler=masked(capacity); state=sampler.init(jax.random.key(0)); dense=Dense(capacity)
    import time
    @jax.jit
    def step(state,new,q):
        state=sampler.add(state,new); before=with_current_masks(state,B); state,slots,_=sampler.sample(state,B)
        after=sampler.update(state,slots,q)
        return after,before,slots
    pos=0
    t0=time.time()
    for t in range(600):
        new=[(pos+k)%capacity for k in range(2)]; pos+=2
        dense.add(new);  q=r.lognormal(size=B);
        state,before,slots=step(state,jnp.array(new,jnp.int32),jnp.asarray(q)); slots=np.asarray(slots)
        m=masks(before,capacity)
        assert (m==dense.masks()).all(), (t, np.flatnonzero(m!=dense.masks()), debts(state,capacity)[m!=dense.masks()], (dense.drawn-dense.expected)[m!=dense.masks()])
        dense.sampled(slots)
        dense.update(slots,q)
        d=debts(state,capacity); np.testing.assert_allclose(d,dense.drawn-dense.expected,atol=1e-8)
        assert abs(d.sum())<1e-6
        if t%100==0: print(t,time.time()-t0)
