"""What deserves a second look in a run, in sentences with a way out. Imports health, search and geometry of ours.

A run is what :func:`mrefali.results.open_run` gives.
"""

import shlex
from dataclasses import dataclass

import numpy as np

from mrefali import geometry, health
from mrefali.search import whole_steps

#: Shares of all particles beyond which a run is unsettled, one class too large, and a border of the search piled up.
UNSETTLED, DOMINANT, PILED = 0.05, 0.5, 0.02

#: How many times the particles of the step before it a border must hold, and what lies beyond, to be piled up.
PILE = 1.2

#: Groups of classes, and classes that are worth keeping, that a sentence names at most.
MOST_GROUPS, MOST_KEPT = 12, 24


@dataclass(frozen=True)
class Borders:
    """How far a search goes along one axis, px from pixel n//2.

    Attributes
    ----------
    reach : (2,) float64
        Lowest and highest shift that one iteration tries for a centred particle.
    limit : (2,) float64
        Where the disc of radius ``ou`` meets the edge of the image, which no search passes.
    step : float
    """

    reach: np.ndarray
    limit: np.ndarray
    step: float


def borders(run, axis):
    """``Borders`` of the search of a run, ``axis`` 0 for x and 1 for y."""
    p = run.parameters
    # of the first stage, by the names of mref_ali2d or of ali2d; a local refinement searches nothing
    half, step = (np.ravel(p.get(old, p.get(new, none)))[0] for old, new, none in (
        (("xrng", "xr", 0.0), ("yrng", "yr", 0.0))[axis], ("step", "ts", 1.0)))
    cut = np.array(geometry.search_range(half, 0.0, run.box, p["outer_radius"]))
    limit = np.array(geometry.search_range(np.inf, 0.0, run.box, p["outer_radius"]))
    return Borders(whole_steps(cut, step) * step * [-1, 1], limit * [-1, 1], float(step))


def started_centered(run):
    """Whether every particle began where its image is centred; then ``Borders.reach`` bounds the first iteration."""
    return bool(np.abs(run.centers[0]).max() < 1e-3)


def piles(run):
    """Borders at which particles are piled up: a list of (axis, border in px, share of the particles there).

    A pile is a share above ``PILED``, and ``PILE`` times as many particles as lie one step further in.
    """
    found = []
    for axis in (0, 1):
        place, b = run.centers[1][:, axis], borders(run, axis)
        if b.reach[1] - b.reach[0] < b.step:
            continue
        edges = {float(edge) for edge in b.limit} | (set(map(float, b.reach)) if started_centered(run) else set())
        for edge in sorted(edges):
            outward = np.sign(edge) * (place - edge)  # a particle at the edge has 0
            there = np.mean(outward > -b.step / 2)
            further_in = np.mean(np.abs(outward + b.step) < b.step / 2)
            if there > max(PILED, PILE * further_in):
                found.append((axis, edge, float(there)))
    return found


def findings(run):
    """List of (title, text) of what may be wrong with a run, the gravest first."""
    checks = (_vanished, _dominant, class_health, _piled, _unsettled, _fallen)
    return [finding for check in checks for finding in check(run)]


def _vanished(run):
    gone = np.flatnonzero(run.vanished)
    if gone.size:
        yield (f"{gone.size} of {run.n_references} classes vanished",
               f"{_named('Class', 'Classes', gone)} {'has' if gone.size == 1 else 'have'} fewer than four particles, "
               "too few for an average. References of unequal contrast do this: --normalize_references scales them; or "
               "give fewer, or --vanished=split, or --assignment=capped.")


def _dominant(run):
    share = run.counts[-1] / run.n_particles
    if run.n_references > 2 and share.max() > DOMINANT:
        yield (f"Class {share.argmax()} holds {share.max():.0%} of all particles",
               "A class that swallows most particles is more often a matter of contrast than of biology: look at the "
               "standard deviations of the references.")


def class_health(run):
    """Findings on classes that show one view, and on classes that are junk, see :mod:`mrefali.health`."""
    groups, place = health.same_views(run.like[-1], run.likeness[-1]), shlex.quote(run.path)
    if groups:
        named = [", ".join(map(str, group[:-1])) + f" and {group[-1]}" for group in groups]
        more = f"; and {len(groups) - MOST_GROUPS} groups more" if len(groups) > MOST_GROUPS else ""
        pooled = ",".join(map(str, groups[0]))
        yield (f"Classes show the same view: {'; '.join(named[:MOST_GROUPS])}{more}",
               f"Aligned and corrected for noise, their averages correlate by {health.SAME_VIEW:g} or more. Give fewer "
               f"references, or put the particles together: mrefali select {place} one.star --classes={pooled}.")
    detail = run.detail[-1]
    poor = health.junk(detail, run.detail_error[-1])
    if poor.size:
        kept = np.setdiff1d(np.flatnonzero(~run.vanished), poor)
        text = ",".join(map(str, kept[:MOST_KEPT])) + (",..." if len(kept) > MOST_KEPT else "")
        yield (f"{_named('Class', 'Classes', poor)} {'looks' if poor.size == 1 else 'look'} like junk, or like several "
               "views in one",
               f"The halves of such an average agree on less than {health.JUNK_DETAIL:.0%} of the detail of the "
               f"median class ({', '.join(f'{detail[k]:.0%}' for k in poor[:MOST_GROUPS])}): its members have little "
               f"in common. Look at them; to go on without: mrefali select {place} good.star --classes={text}.")


def _piled(run):
    for axis, edge, share in piles(run):
        name, option = "xy"[axis], ("--xr", "--yr")[axis]
        at_limit = edge in borders(run, axis).limit
        way_out = ("There the disc of radius ou meets the edge of the image: give a smaller --ou, or a larger box"
                   if at_limit else f"Give a larger {option}")
        yield (f"{share:.0%} of the particles are piled up at {name} = {edge:+g} px",
               f"That is a border of the search, so their true place lies beyond it. {way_out}.")


def _unsettled(run):
    changed = run.changed[-1].sum() / run.n_particles
    if run.n_iterations > 1 and changed > UNSETTLED:
        yield (f"{changed:.0%} of the particles still changed class in the last iteration",
               "The classes have not settled: more iterations may help, or fewer references that look alike. Go on "
               "with the last averages as references.")


def _fallen(run):
    if run.n_iterations > 1 and run.criterion[-1] < run.criterion[-2]:
        yield ("The criterion fell in the last iteration",
               f"From {run.criterion[-2]:.6g} to {run.criterion[-1]:.6g}. Small falls are usual once a run has "
               "settled; --maxit=0 ends a run at the first.")


def _named(one, several, numbers, most=12):
    """``Class 3``, or ``Classes 1, 2, 3 and 7 more``."""
    text = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{one if len(numbers) == 1 else several} {text}{more}"
