"""What deserves a second look in a run, in sentences with a way out, of options that its command has.

Imports health, search, assignment and geometry of ours. A run is what :func:`mrefali.results.open_run` gives.
"""

import shlex
from dataclasses import dataclass

import numpy as np

from mrefali import geometry, health
from mrefali.assignment import LIMITED
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
    checks = (_vanished, _dominant, class_health, _piled, _unsettled, _fallen, _fewer_than_asked)
    return [finding for check in checks for finding in check(run)]


def _fewer_classes(run):
    """How the command of a run is told to make fewer classes."""
    return "a smaller --K" if "K" in run.parameters else "fewer references"


def _unequal(parameters):
    """Whether references compete with the standard deviations that they have; not where each particle has its class."""
    return parameters.get("normalize_references") is False and parameters.get("assignment") != "likeliest"


def ways_to_keep_classes(unequal, vanished, assignment, fewer):
    """What may help where classes vanish, of the options that are not set yet.

    Parameters
    ----------
    unequal : bool
        Whether references compete with the standard deviations that they have.
    vanished, assignment : str or None
        As for ``mref_ali2d``; None if the command has no such option.
    fewer : str
        How the command is told to make fewer classes.
    """
    ways = ["--normalize_references"] if unequal else []
    ways += [] if vanished in (None, "split") else ["--vanished=split"]
    ways += [] if assignment in (None, *LIMITED) else ["--assignment=capped"]
    return " or ".join([*ways, fewer])


def _vanished(run):
    gone, p = np.flatnonzero(run.vanished), run.parameters
    if gone.size:
        unequal = _unequal(p)
        why = " References of unequal contrast do this." if unequal else ""
        ways = ways_to_keep_classes(unequal, p.get("vanished"), p.get("assignment"), _fewer_classes(run))
        yield (f"{gone.size} of {run.n_references} classes vanished",
               f"{_named('Class', 'Classes', gone)} {'has' if gone.size == 1 else 'have'} fewer than four particles, "
               f"too few for an average.{why} Try {ways}.")


def _dominant(run):
    share = run.counts[-1] / run.n_particles
    if run.n_references > 2 and share.max() > DOMINANT:
        why = ("a matter of contrast than of biology: look at the standard deviations of the references"
               if _unequal(run.parameters) else "several views in one, or junk, than one view: look at its average")
        yield (f"Class {share.argmax()} holds {share.max():.0%} of all particles",
               f"A class that swallows most particles is more often {why}.")


def class_health(run):
    """Findings on classes that show one view, and on classes that are junk, see :mod:`mrefali.health`."""
    groups, place = health.same_views(run.like[-1], run.likeness[-1]), shlex.quote(run.path)
    if groups:
        named = [", ".join(map(str, group[:-1])) + f" and {group[-1]}" for group in groups]
        more = f"; and {len(groups) - MOST_GROUPS} groups more" if len(groups) > MOST_GROUPS else ""
        pooled = ",".join(map(str, groups[0]))
        yield (f"Classes show the same view: {'; '.join(named[:MOST_GROUPS])}{more}",
               f"Aligned and corrected for noise, their averages correlate by {health.SAME_VIEW:g} or more. Give "
               f"{_fewer_classes(run)}, or put the particles together: mrefali select {place} one.star "
               f"--classes={pooled}.")
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
        name, option = "xy"[axis], "--yr" if axis and "K" not in run.parameters else "--xr"
        at_limit = edge in borders(run, axis).limit
        way_out = ("There the disc of radius ou meets the edge of the image: give a smaller --ou, or a larger box"
                   if at_limit else f"Give a larger {option}")
        yield (f"{share:.0%} of the particles are piled up at {name} = {edge:+g} px",
               f"That is a border of the search, so their true place lies beyond it. {way_out}.")


def _unsettled(run):
    changed = run.changed[-1].sum() / run.n_particles
    if run.n_iterations > 1 and changed > UNSETTLED:
        yield (f"{changed:.0%} of the particles still changed class in the last iteration",
               f"The classes have not settled: more iterations may help, or {_fewer_classes(run)}, if some look alike. "
               "Go on with the last averages as references.")


def _fallen(run):
    if run.n_iterations > 1 and run.criterion[-1] < run.criterion[-2]:
        # maxit=0 of classify ends later
        way_out = "; --maxit=0 ends a run at the first" if run.parameters["maxit"] and "K" not in run.parameters else ""
        yield ("The criterion fell in the last iteration",
               f"From {run.criterion[-2]:.6g} to {run.criterion[-1]:.6g}. Small falls are usual once a run has "
               f"settled{way_out}.")


def _fewer_than_asked(run):
    asked = run.parameters.get("K", 0)
    if run.n_references < asked:
        yield (f"{run.n_references} classes were found, K={asked} asked for",
               "No more could be told apart from noise in the particles that are looked at, 100 for each of K, 2000 at "
               "least. Where there are more, a larger --K may find rarer views; else more particles, or particles that "
               "are better centred.")


def _named(one, several, numbers, most=12):
    """``Class 3``, or ``Classes 1, 2, 3 and 7 more``."""
    text = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{one if len(numbers) == 1 else several} {text}{more}"
