"""The main job on files: check everything, run the refinement, write what it finds; and the same on arrays."""

import datetime
import importlib.metadata
import logging
import math
import os
import platform
import shlex
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numba
import numpy as np

import mrefali
from mrefali import checkpoint, classification, geometry, parallel, signals
from mrefali.aligner import Aligner
from mrefali.assignment import LIMITED
from mrefali.checkpoint import Checkpoint, as_read, pose_checksum
from mrefali.checks import Options, check_places, check_saving, prepare, use_threads
from mrefali.errors import InputError, RunFailed, Stopped, one_line
from mrefali.findings import class_health, ways_to_keep_classes
from mrefali.io import ArrayStack, check_new_file, check_room, hold, open_stack, write_stack
from mrefali.outdir import OutputDirectory, bytes_needed
from mrefali.page import Reporter
from mrefali.refine import Iteration, first_average, first_state, mean_class_size, refine
from mrefali.results import Run, require_pictures
from mrefali.search import whole_steps

logger = logging.getLogger(__name__)
details = logging.getLogger("mrefali.details")  # for the log of the run alone

#: Particles a thread that are searched to estimate the time of a run.
TIMED_PARTICLES = 32

#: Share of the particles that may still change class where ``classify`` ends.
SETTLED = 0.01


def mref_ali2d(stack, refim, outdir, maskfile=None, ir=1, ou=-1, rs=1, xrng=0, yrng=0, step=1, center=1, maxit=0,
               CTF=False, snr=1.0, user_func_name="ref_ali2d", rand_seed=1000, MPI=False, *,
               mirror=True, subpixel=False, lowpass=None, highpass=None, vanished="random", center_limit=None,
               interpolation="quadratic", normalize_references=False, assignment="best", threads=0, max_memory=None,
               quiet=False, check=False, live=False, resume=False, save_every=0, write_back="journal"):
    """Align a stack to several references and average each class, as SPARX's ``mref_ali2d`` does.

    Parameters
    ----------
    stack : str
        Square 2-D images, in HDF and bdb with ``xform.align2d`` in their headers. At the end their ``xform.align2d``
        and ``assign`` are set; their pixels never change. Files of other formats stay as they are, and ``outdir`` gets
        ``particles.star`` and ``class_averages.mrcs``.
    refim : str
        Initial references of the same box.
    outdir : str
        Made here; must not exist, but for ``resume``.
    maskfile : str or (n, n) array, optional
        For normalisation and criterion; without it a disc of radius ``ou``.
    ir, ou, rs : int, px
        First ring, last ring (-1: n//2 - 2) and ring step.
    xrng, yrng, step : float or list of float, px
        Half-ranges and step of the translation search. A list has one for each stage, of ``maxit`` iterations; the
        next stage goes on from the averages and poses of the last.
    center : int
        0 none, 1 phase centre of gravity, -1 mean shift of the class, 2 correlation with the mask, 3 correlation with
        the average's own rotational average, 4 phase centre of the power, within a dead band.
    maxit : int
        Iterations of a stage; 0 means at most ten, ended when the criterion falls.
    CTF : bool
        Weight by the CTF in the headers ``ctf``; particles whose ``ctf_applied`` is 1 are multiplied by it already.
    snr : float
        Signal-to-noise ratio of the Wiener term.
    user_func_name : str or callable
        Reference function, see :func:`mrefali.reference.find_function`.
    rand_seed : int
        Seed of the draws that replace vanished classes.
    MPI : bool
        Share the particles among MPI ranks.
    mirror : bool
        Try mirrored particles too.
    subpixel : bool
        Refine what the search finds continuously in shift and angle.
    lowpass : float, optional, 1/px
        Low-pass the references for the alignment, in the first iteration at this frequency, then at ever higher ones;
        the last has none.
    highpass : float, optional, 1/px
        High-pass the references for the alignment.
    vanished : str
        What replaces the reference of a class with fewer than four particles: ``random`` a particle drawn at random,
        ``split`` the worse half of the largest class, ``keep`` the reference it had, ``reseed`` the particles that fit
        worst.
    center_limit : float, optional, px
        An average whose centre lies farther out is left where it is.
    interpolation : str
        How values between pixels are found where particles are moved into the averages: ``quadratic`` as the original,
        ``fourier`` for band-limited images, slower and with less loss near Nyquist.
    normalize_references : bool
        Scale the references to one standard deviation for the alignment; else the one with most contrast wins.
    assignment : str
        ``best``: each particle goes to the reference it correlates best with. ``likeliest``: to its most probable
        class, see :mod:`mrefali.likelihood`; references are filtered for it by the contrast of the particles and
        scaled, see :mod:`mrefali.contrast`. ``capped``: no class is larger than
        three times its equal share; ``equal``: sizes differ by one at most. Within these limits the sum of the
        correlations is the largest there is, see :func:`mrefali.assignment.assign_within_limits`.
    threads : int
        Threads of this process; 0: all cores it may use, shared among the MPI ranks that may use the same.
    max_memory : str or int, optional
        Memory that each process may take, such as ``4GB``, or bytes; fewer pixels are read at a time to keep to it.
    quiet : bool
        Report warnings only.
    check : bool
        Check everything, report search range and estimates of time and memory, and stop.
    live : bool
        Write the page of the run, ``report.html``, after every iteration and not only at the end.
    resume : bool
        Go on after the last iteration that the same call finished in ``outdir``; the result is that of a run that was
        never ended.
    save_every : int
        Write the headers after every so many iterations too; 0: at the end only.
    write_back : str
        ``journal`` or ``copy``, see :meth:`mrefali.io.HdfStack.write_columns`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed; under MPI on all ranks alike.
    RunFailed
        Where a file of the run cannot be read or written any more.
    Stopped
        On a signal, at the command line.
    """
    call = dict(locals())
    _run_on_files(Options(
        mask=maskfile, ir=ir, ou=ou, rs=rs, xr=xrng, yr=yrng, ts=step, center=center, maxit=maxit, CTF=CTF, snr=snr,
        function=user_func_name, rand_seed=rand_seed, vanished=vanished, center_limit=center_limit, quiet=quiet,
        mirror=mirror, max_memory=max_memory, subpixel=subpixel, lowpass=lowpass, highpass=highpass,
        interpolation=interpolation, normalize_references=normalize_references, assignment=assignment), call)


def local_ali2d(stack, refim, outdir, maskfile=None, *, ir=1, ou=-1, center=4, maxit=10, CTF=False, snr=1.0,
                function="ref_ali2d", lowpass=None, highpass=None, center_limit=None, MPI=False, threads=0,
                max_memory=None, quiet=False, check=False, live=False, resume=False, save_every=0,
                write_back="journal"):
    """Refine poses continuously about their present values, each particle against the class that it has.

    Class and mirror stay. Files, CTF, averages and MPI are as for :func:`mref_ali2d`; a class of fewer than four
    particles keeps its reference.

    Parameters
    ----------
    stack : str
        Square 2-D images with ``xform.align2d`` and ``assign`` in their headers, both set at the end.
    refim : str
        The references that ``assign`` counts, or a single one for all particles.
    ir, ou : int, px
        The pixels from half a pixel within ``ir`` to ``ou`` (-1: n//2 - 2) from the middle of the reference count.
    function : str or callable
        Reference function, see :func:`mrefali.reference.find_function`.
    outdir, maskfile, center, maxit, CTF, snr, lowpass, highpass, center_limit, MPI, threads, max_memory, quiet, \
check, live, resume, save_every, write_back
        As for :func:`mref_ali2d`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed; under MPI on all ranks alike.
    RunFailed
        Where a file of the run cannot be read or written any more.
    Stopped
        On a signal, at the command line.
    """
    call = dict(locals())
    _run_on_files(Options(
        mask=maskfile, ir=ir, ou=ou, rs=1, xr=0.0, yr=0.0, ts=1.0, center=center, maxit=maxit, CTF=CTF, snr=snr,
        function=function, rand_seed=0, vanished="keep", center_limit=center_limit, quiet=quiet, local=True,
        lowpass=lowpass, highpass=highpass, max_memory=max_memory), call)


def ali2d(stack, outdir, maskfile=None, *, ir=1, ou=-1, rs=1, xr=(4.0, 2.0, 1.0, 1.0), yr=-1,
          ts=(2.0, 1.0, 0.5, 0.25), center=-1, maxit=0, CTF=False, snr=1.0, function="ref_ali2d", rand_seed=1000,
          MPI=False, mirror=True, subpixel=False, lowpass=None, highpass=None, center_limit=None,
          interpolation="quadratic", threads=0, max_memory=None, quiet=False, check=False, live=False, resume=False,
          save_every=0, write_back="journal"):
    """Align a stack to its own average, coarse to fine, as SPARX's ``sxali2d`` does.

    The first reference is the average of all particles by the poses in their headers; where all of those are the
    identity, each particle is turned by an angle drawn at random, so that nothing is aligned to an orientation that the
    images happen to have in common. Each iteration aligns all particles to the average of the last. Files, CTF,
    averages and MPI are as for :func:`mref_ali2d`, with a single class.

    Parameters
    ----------
    stack : str
        At least four square 2-D images, in HDF and bdb with ``xform.align2d`` in their headers, which is set at the
        end; ``assign`` becomes 0.
    xr, yr, ts : float or sequence of float, px
        Half-ranges and step of the translation search, one for each stage of ``maxit`` iterations; ``yr=-1``: as
        ``xr``.
    maxit : int
        Iterations of a stage; 0 means at most ten, ended when the criterion falls.
    function : str or callable
        Reference function, see :func:`mrefali.reference.find_function`; the first average passes it too.
    rand_seed : int
        Seed of the angles drawn; at least 0.
    outdir, maskfile, ir, ou, rs, center, CTF, snr, MPI, mirror, subpixel, lowpass, highpass, center_limit, \
interpolation, threads, max_memory, quiet, check, live, resume, save_every, write_back
        As for :func:`mref_ali2d`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed; under MPI on all ranks alike.
    RunFailed
        Where a file of the run cannot be read or written any more.
    Stopped
        On a signal, at the command line.
    """
    yr = xr if yr == -1 else yr
    call = dict(locals())
    _run_on_files(Options(
        mask=maskfile, ir=ir, ou=ou, rs=rs, xr=xr, yr=yr, ts=ts, center=center, maxit=maxit, CTF=CTF, snr=snr,
        function=function, rand_seed=rand_seed, vanished="keep", center_limit=center_limit, quiet=quiet, mirror=mirror,
        max_memory=max_memory, subpixel=subpixel, lowpass=lowpass, highpass=highpass, interpolation=interpolation,
        reference_free=True), call)


def classify(stack, outdir, maskfile=None, *, K, ir=1, ou=-1, xr=-1, ts=1.0, center=-1, maxit=0, CTF=False, snr=1.0,
             function="ref_ali2d", rand_seed=1000, MPI=False, mirror=True, subpixel=True, lowpass=None, highpass=None,
             vanished="split", center_limit=None, interpolation="quadratic", assignment="likeliest", threads=0,
             max_memory=None, quiet=False, check=False, live=False, resume=False, save_every=0, write_back="journal"):
    """From raw particles to classes: references are found in the particles, then refined with all of them.

    The references are the averages of the classes that :mod:`mrefali.seeding` finds in some of the particles, drawn at
    random, see :func:`mrefali.classification.n_drawn`. Then this is :func:`mref_ali2d` with other defaults. The poses
    in the headers are ignored.

    Parameters
    ----------
    stack : str
        Square 2-D images; at the end the headers of HDF and bdb have their poses and classes.
    K : int
        Classes at most: fewer are made where nothing but noise tells so many apart.
    ou : int, px
        Last ring; -1: as large as a search of ``xr`` allows, n//2 - 1 - ``xr``.
    xr : float, px
        Half-range of the search in x and y, so how well centred the particles are; -1: a twentieth of the box.
    maxit : int
        Iterations after the seeds; 0: at most ten, ended when no more than 1 % of the particles change class.
    outdir, maskfile, ir, ts, center, CTF, snr, function, rand_seed, MPI, mirror, subpixel, lowpass, highpass, \
vanished, center_limit, interpolation, assignment, threads, max_memory, quiet, check, live, resume, save_every, \
write_back
        As for :func:`mref_ali2d`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed; under MPI on all ranks alike.
    RunFailed
        Where a file of the run cannot be read or written any more.
    Stopped
        On a signal, at the command line.
    """
    call = dict(locals())
    _run_on_files(Options(
        mask=maskfile, ir=ir, ou=ou, rs=1, xr=xr, yr=xr, ts=ts, center=center, maxit=maxit, CTF=CTF, snr=snr,
        function=function, rand_seed=rand_seed, vanished=vanished, center_limit=center_limit, quiet=quiet,
        mirror=mirror, max_memory=max_memory, subpixel=subpixel, lowpass=lowpass, highpass=highpass,
        interpolation=interpolation, normalize_references=True, assignment=assignment, reference_free=True,
        K=K, settled=SETTLED), call)


def seed(stack, refs, maskfile=None, *, K, ou=-1, xr=-1, center=-1, CTF=False, snr=1.0, rand_seed=1000, mirror=True,
         threads=0, max_memory=None, quiet=False):
    """Write references found in unaligned particles: those that :func:`classify` begins with by default.

    Parameters
    ----------
    stack : str
        Square 2-D images; only read.
    refs : str
        File of the references, HDF; must not exist.
    maskfile, K, ou, xr, center, CTF, snr, rand_seed, mirror, threads, max_memory, quiet
        As for :func:`classify`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Nothing was created then.
    """
    comm = parallel.communicator(False)  # which refuses several processes
    with stopping_with(lambda: "nothing was created"), use_threads(threads):
        check_new_file(refs, ".hdf")
        particles = open_stack(stack)
        plan = prepare(particles, None, Options(
            mask=maskfile, ir=1, ou=ou, rs=1, xr=xr, yr=xr, ts=1.0, center=center, maxit=1, CTF=CTF, snr=snr,
            function="ref_ali2d", rand_seed=rand_seed, vanished="keep", center_limit=None, quiet=quiet, mirror=mirror,
            max_memory=max_memory, reference_free=True, K=K), comm)
        references, _ = classification.find_references(plan.particles, plan.settings, K, comm, _report_seeds)
        write_stack(refs, references, pixel_size_A=particles.pixel_size_A)
    logger.info("%d references in %s, found with ou=%d and xr=%g", len(references), refs,
                plan.settings.search.outer_radius, plan.settings.search.xr)


def _run_on_files(options, call):
    """Check everything; then run, unless that is all that was asked for. ``call`` holds the caller's arguments."""
    stack, outdir = call["stack"], call["outdir"]
    comm = parallel.communicator(call["MPI"])
    with (comm.ending_together(), stopping_with(lambda: "no iteration was begun, and nothing was created or changed"),
          use_threads(call["threads"], comm), ExitStack() as held):
        with comm.agreeing():
            check_saving(call["save_every"], call["write_back"])
            if call["live"]:
                require_pictures("live")
            if comm.is_root:
                held.enter_context(hold(stack))
        particles = open_on_all_ranks(stack, comm)
        references = None if options.reference_free else open_on_all_ranks(call["refim"], comm)
        check_places(particles, outdir, comm, call["resume"], call["write_back"])
        plan = prepare(particles, references, options, comm)
        with comm.agreeing():
            earlier = checkpoint.load(os.fspath(outdir)) if call["resume"] and comm.is_root else None
            if comm.is_root:
                _check_output(plan, options, call, earlier)
        if options.K is not None:
            search = plan.settings.search
            call |= {"ou": search.outer_radius, "xr": search.xr, "yr": search.yr}
            plan = _with_seeds(plan, options.K, earlier, call, comm)
        elif options.reference_free:
            plan = _with_first_average(plan, comm)
        signals.check()
        if call["check"]:
            if comm.is_root:
                report_range(plan)
                _report_obstacle(particles, outdir)
                report_memory(plan)
                if options.K is not None and not call["resume"]:
                    seconds = classification.estimate_seconds(plan.particles, plan.settings, options.K)
                    logger.info("estimate: %s to find the references, several times that with more views than K",
                                _duration(seconds))
                report_time([plan], comm)
            return
        with comm.agreeing():
            run = held.enter_context(_Run(plan, options, call, comm, earlier)) if comm.is_root else None
        state = comm.from_root(run.state if comm.is_root else None)
        if comm.is_root:
            run.go_on()
        else:
            standing = f"finished iterations are in {outdir}; the same call with --resume goes on from there"
            with files_may_fail(lambda: f"{stack} is as it was"), stopping_with(lambda: standing):
                for _ in refine(plan.particles, plan.references, plan.poses, plan.settings, comm, state):
                    pass


def _check_output(plan, options, call, earlier):
    """That there is room for what is written, and a place; ``earlier`` is the checkpoint of a run that goes on."""
    obstacle, save_every = plan.stack.write_back_obstacle(), call["save_every"]
    if obstacle is not None and save_every:
        raise InputError(f"save_every={save_every} is not possible: {obstacle}; leave it out")
    path = os.fspath(call["outdir"])
    iterations = plan.settings.most_iterations - (0 if earlier is None else earlier.state.number + 1)
    n_references = len(plan.references) if plan.references is not None else options.K or 1
    check_room(os.path.dirname(os.path.abspath(path)), bytes_needed(
        plan.stack.n_images, n_references, plan.stack.box, iterations),
        f"{path} gets the results of {iterations} iterations", "give a place where there is more")


def _with_first_average(plan, comm):
    """The plan with the average of all particles as its reference, and the poses that centre it."""
    poses = plan.poses
    if not any(poses[name].any() for name in poses.dtype.names):
        # an orientation that all particles have in common would stay in all averages that follow
        poses = geometry.make_poses(np.random.default_rng(plan.settings.rand_seed).uniform(0, 360, len(poses)))
    with files_may_fail(lambda: "nothing was created or changed"):
        references, start = first_average(plan.particles, poses, plan.settings, comm)
    return replace(plan, references=references, start=start)


def _with_seeds(plan, n_classes, earlier, call, comm):
    """The plan with references found in the particles, and with the classes of those that they are made of.

    A run that goes on has references already, in its checkpoint ``earlier``. Where all is only to be checked the first
    particles are the references, which take as long to search.
    """
    notes, classes = [], None

    def report(text):
        _report_seeds(text)
        notes.append(f"seeds: {text}")

    if call["resume"]:
        references = comm.from_root(earlier.state.references if comm.is_root else None)
    elif call["check"]:
        references = plan.particles.read(slice(0, n_classes))
    else:
        references, classes = classification.find_references(plan.particles, plan.settings, n_classes, comm, report)
    start = geometry.identity_poses(plan.stack.n_images)
    return replace(plan, references=references, classes=classes, start=start, notes=notes)


def _report_seeds(text):
    signals.check()
    logger.info("seeds: %s", text)


def open_on_all_ranks(path, comm):
    """The stack ``path`` on every rank; a table of particles is read by the root, the others get its arrays."""
    with comm.agreeing():
        stack = open_stack(path) if comm.is_root else None
    shared = comm.from_root(stack if comm.is_root and stack.read_only else None)
    if shared is not None:
        return shared
    with comm.agreeing():
        return stack if comm.is_root else open_stack(path)


@dataclass(frozen=True)
class Aligned:
    """What :func:`align` found.

    Attributes
    ----------
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
    peak : (n_particles,) float64
    averages : (n_references, n, n) float32
    iterations : list of mrefali.refine.Iteration
    """

    iterations: list[Iteration]

    @property
    def assign(self):
        return self.iterations[-1].assign

    @property
    def poses(self):
        return self.iterations[-1].poses

    @property
    def peak(self):
        return self.iterations[-1].peak

    @property
    def averages(self):
        return self.iterations[-1].averages


def align(images, references, poses=None, mask=None, *, ir=1, ou=-1, rs=1, xr=0.0, yr=0.0, ts=1.0, center=1, maxit=10,
          function="ref_ali2d", rand_seed=1000, mirror=True, subpixel=False, lowpass=None, highpass=None,
          vanished="random", center_limit=None, interpolation="quadratic", normalize_references=False,
          assignment="best", threads=0, quiet=False):
    """Multi-reference alignment of arrays; no file is read or written.

    Parameters
    ----------
    images : (n_particles, n, n) array_like
    references : (n_references, n, n) array_like
    poses : (n_particles,) geometry.POSE, optional
        Where the search starts; identity if not given.
    mask : (n, n) array_like, optional
        A disc of radius ``ou`` if not given.
    ir, ou, rs, xr, yr, ts, center, maxit, function, rand_seed, mirror, subpixel, lowpass, highpass, vanished, \
center_limit, interpolation, normalize_references, assignment, threads, quiet
        As for :func:`mref_ali2d`.

    Returns
    -------
    Aligned
    """
    comm = parallel.SERIAL
    with use_threads(threads):
        plan = prepare(ArrayStack(images, "images"), ArrayStack(references, "references"), Options(
            mask=mask, ir=ir, ou=ou, rs=rs, xr=xr, yr=yr, ts=ts, center=center, maxit=maxit, function=function,
            rand_seed=rand_seed, vanished=vanished, center_limit=center_limit, quiet=quiet, mirror=mirror,
            subpixel=subpixel, lowpass=lowpass, highpass=highpass, interpolation=interpolation,
            normalize_references=normalize_references, assignment=assignment), comm, poses)
        return Aligned(list(refine(plan.particles, plan.references, plan.poses, plan.settings, comm)))


# --- what is reported and written


class _Run:
    """What the root of a run does with files; on entering it makes OUTDIR, or goes on in it.

    Attributes
    ----------
    state : refine.State
        After the last finished iteration.
    """

    def __init__(self, plan, options, call, comm, earlier):
        self._plan, self._call, self._comm = plan, call, comm
        self._stack, self._settings = plan.stack, plan.settings
        self._path, self._save_every = os.fspath(call["outdir"]), call["save_every"]
        self._versions = versions("numba", "numpy", "scipy", "h5py")
        self._facts = checkpoint.facts(plan, options)
        self._headers = pose_checksum(plan.poses, plan.assign)  # in the stack
        self._obstacle = self._stack.write_back_obstacle()
        self._saved = None  # iteration whose poses are in the headers
        self._reporter = Reporter(self._path, self._stack, call["live"])
        self._earlier = earlier  # checkpoint of a run that goes on
        if earlier is None:
            self.state = first_state(plan.references, plan.start, self._settings, plan.classes)
        else:
            checkpoint.check_same(self._path, earlier, self._facts, self._headers)
            self.state = earlier.state

    def __enter__(self):
        log_bytes = None if self._earlier is None else self._earlier.log_bytes
        with ExitStack() as closing:
            self._output = closing.enter_context(OutputDirectory(self._path, self._stack.pixel_size_A, log_bytes))
            self._begin()
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *exception):
        return self._closing.__exit__(*exception)

    def _begin(self):
        parameters = describe(self._plan, len(self._plan.references), self._call, self._comm) | self._versions
        self._output.begin(parameters, self._plan.assign, self._plan.poses)
        for name, value in parameters.items():
            details.debug("%s: %s", name, value)
        for note in self._plan.notes:
            details.info(note)
        if self._earlier is not None:
            self._report_resumption()
        report_range(self._plan)
        report_memory(self._plan)
        _report_obstacle(self._stack, self._path)
        self._keep()
        self._output.has_begun()

    def _report_resumption(self):
        logger.info("resumed after %d finished iterations", self.state.number + 1)
        other = [f"{name} {self._versions.get(name)} (was {version})" for name, version in
                 self._earlier.versions.items() if self._versions.get(name) != version]
        if other:
            logger.warning("resumed with %s: the result may differ in its last digits from that of a run never ended",
                           ", ".join(other))

    def _keep(self):
        """Have the present state on the disk."""
        may_stand = [self._headers, pose_checksum(as_read(self.state.poses), self.state.assign)]
        checkpoint.save(self._path, Checkpoint(self.state, self._facts, self._versions, may_stand, self._output.sync()))

    def go_on(self):
        """All iterations that are left, and the headers."""
        plan, settings = self._plan, self._settings
        with files_may_fail(self._standing), stopping_with(self._standing):
            for iteration in refine(plan.particles, plan.references, plan.poses, settings, self._comm, self.state):
                self._output.write_iteration(iteration)
                _report_iteration(iteration, settings)
                self.state = iteration.state
                self._keep()
                self._reporter.refresh()
                if self._save_every and (iteration.number + 1) % self._save_every == 0:
                    self._write_headers()
            number = self.state.number
            if self.state.stopped and number + 1 < settings.most_iterations:
                reason = ("the criterion fell" if settings.settled is None else
                          f"no more than {settings.settled:.0%} of the particles changed class")
                logger.info("stopped after iteration %d: %s", number, reason)
            self._output.write_end(number)
            if self._stack.read_only:
                self._output.write_average_images(self.state.references)
            for title, text in class_health(Run(self._path)):
                logger.warning("%s. %s", title, text)
        written = self._write_back()
        logger.info("done: averages and FRC curves in %s, %s in %s", self._path,
                    "poses and classes" if self._stack.read_only else "xform.align2d and assign", written)
        done = f"but the run is done: averages in {self._path}, poses and classes in {written}"
        with files_may_fail(lambda: done), stopping_with(lambda: done):
            self._reporter.finish()

    def _standing(self):
        finished, total = self.state.number + 1, _most_iterations(self._settings)
        headers = "is as it was" if self._saved is None else f"has the headers of iteration {self._saved}"
        return (f"{finished} of {total} iterations are finished in {self._path}, and {self._stack.path} {headers}; the "
                "same call with --resume goes on from there")

    def _write_back(self):
        """Poses and classes into the headers of the stack, or else into OUTDIR; where they are."""
        table = f"{self._path}/poses.csv"
        state = f"but the run is done, its result in {table}"
        if self._stack.read_only:
            with files_may_fail(lambda: state), stopping_with(self._standing):
                return self._output.write_particles(self._stack, self.state.poses, self.state.assign)
        if self._obstacle is not None:
            with files_may_fail(lambda: state), stopping_with(self._standing):
                matrices = geometry.to_matrices(self.state.poses)
                return self._output.write_poses_stack(self._stack, matrices, self.state.assign)
        command = (f"mrefali header {shlex.quote(self._stack.path)} --params=xform.align2d,assign "
                   f"--import={shlex.quote(table)} puts it into the headers")
        with files_may_fail(lambda: f"{state}: {command}"), stopping_with(lambda: f"{state}: {command}"):
            self._write_headers()
        return f"the headers of {self._stack.path}"

    def _write_headers(self):
        state = self.state
        self._stack.write_columns({"xform.align2d": state.poses, "assign": state.assign}, self._call["write_back"])
        self._headers, self._saved = pose_checksum(as_read(state.poses), state.assign), state.number


@contextmanager
def files_may_fail(state):
    """Turn what a file does to a run that has begun into one line, which ends with the state of things, a function."""
    try:
        yield
    except (InputError, OSError) as error:
        raise RunFailed(f"{one_line(error)}; {state()}") from error


@contextmanager
def stopping_with(state):
    """Have a signal that ends a run say the state of things, which the function ``state`` tells."""
    try:
        yield
    except (Stopped, Exception) as error:  # a library that is interrupted can end by an exception of its own
        number = signals.received() if isinstance(error, Exception) else error.number
        if number is None or getattr(error, "state", None) is not None:
            raise
        raise Stopped(number, state()) from None


def _search_and_sum_few(plan, n_particles):
    """Do with the first particles what an iteration does with all; the seconds it took."""
    stage, few = plan.settings.stages[0], slice(0, n_particles)
    counts = np.full(len(plan.references), mean_class_size(plan.stack.n_images, len(plan.references)))
    aligner = Aligner(plan.references, stage, 0, counts)
    sums = plan.settings.class_sums(len(plan.references), plan.particles)
    began = time.perf_counter()
    images = plan.particles.read(few)
    classes = np.full(n_particles, -1, np.int32) if plan.classes is None else plan.classes[few]
    if stage.assignment in LIMITED:
        classes = aligner.peaks(images, plan.start[few]).argmax(axis=1).astype(np.int32)
    found = aligner(images, plan.start[few], classes)
    sums.add(images, found.poses, found.assign, np.arange(n_particles), plan.particles.ctf_sq(few))
    return time.perf_counter() - began


def versions(*packages):
    """``{name: version}`` of these packages, of this one and of Python."""
    return {name: importlib.metadata.version(name) for name in packages} | {
        "mrefali": mrefali.__version__, "python": platform.python_version()}


def describe(plan, n_references, call, comm):
    """Every option of the call, and what it came to."""
    search = plan.settings.search
    return {
        **{name: _plain(value) for name, value in call.items()},
        "folder": os.getcwd(), "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "n_particles": plan.stack.n_images, "n_references": n_references, "box": search.box,
        "pixel_size_A": plan.stack.pixel_size_A, "inner_radius": search.inner_radius,
        "outer_radius": search.outer_radius, "ring_step": search.ring_step,
        "most_iterations": plan.settings.most_iterations,
        "ranks": comm.size, "threads_used": numba.get_num_threads(),
    }


def _plain(value):
    """An option of the call as ``parameters.json`` can hold it."""
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list) and all(isinstance(number, int | float) for number in value):
        return value
    return "array" if isinstance(value, np.ndarray | list) else value


def report_range(plan):
    """Log the translations that are really tried, and warn where they are fewer than asked for (NEEDS 15)."""
    for stage in plan.settings.stages:
        _report_stage(plan, stage)


def _report_stage(plan, settings):
    search = settings.search
    references = f"{len(plan.references)} reference{'s' * (len(plan.references) > 1)}"
    if settings.local:
        logger.info("%d particles of %d x %d px, %s, refined about their present poses over a disc of %d px",
                    plan.stack.n_images, search.box, search.box, references, search.outer_radius)
        return
    lines = []
    for axis, half in (("x", search.xr), ("y", search.yr)):
        limits = geometry.search_range(half, 0.0, search.box, search.outer_radius)
        left, right = whole_steps(np.array(limits), search.shift_step) * search.shift_step
        lines.append(f"{axis} {0 - left:g} to {right:g} px")
        if min(limits) < half:
            short = half - min(limits)
            logger.warning("%sr=%g is cut to %g for a centred particle, since the disc of radius ou=%d must stay "
                           "inside the %d-pixel image: ou=%d would leave it whole", axis, half, min(left, right),
                           search.outer_radius, search.box, search.outer_radius - math.ceil(short))
        elif left < half - 1e-5:
            logger.warning("%sr=%g is no whole number of steps of ts=%g: the search ends at %g", axis, half,
                           search.shift_step, left)
    logger.info("%d particles of %d x %d px, %s, rings %d to %d px in steps of %d; search for a centred "
                "particle: %s, in steps of %g px%s", plan.stack.n_images, search.box, search.box, references,
                search.inner_radius, search.outer_radius, search.ring_step, ", ".join(lines), search.shift_step,
                ", then refined continuously" if settings.subpixel else "")


def _report_obstacle(stack, outdir):
    """Say that the poses will not be in the headers, where something is in the way, and return what."""
    obstacle = stack.write_back_obstacle()
    if stack.read_only:
        logger.info("%s stays as it is; poses and classes will go into %s/particles.star", stack.path, outdir)
        if not stack.has_poses():
            logger.info("%s has no poses: the search starts from the identity", stack.path)
    elif obstacle is not None:
        logger.warning("the headers of %s cannot be written back: %s; poses and classes will go into %s", stack.path,
                       obstacle, outdir)
    return obstacle


def report_memory(plan):
    """Log what a rank will take, and how many particles that is at a time."""
    size = min(plan.particles.block_size, plan.stack.n_images)
    logger.info("estimate: about %.0f MB of memory a rank; %d particles are read at a time", plan.n_bytes / 2**20, size)


def report_time(plans, comm):
    """Time a few particles, and log what iterations take that refine by each of ``plans``."""
    seconds = sum(_seconds_an_iteration(plan, comm) for plan in plans)
    iterations = plans[0].settings.most_iterations
    logger.info("estimate: about %s an iteration, %s for %d, on %d threads of %d ranks", _duration(seconds),
                _duration(seconds * iterations), iterations, numba.get_num_threads(), comm.size)


def _seconds_an_iteration(plan, comm):
    n_particles = plan.stack.n_images
    timed = min(TIMED_PARTICLES * numba.get_num_threads(), n_particles)
    return _search_and_sum_few(plan, timed) / timed * n_particles / comm.size


def _duration(seconds):
    return f"{seconds:.2g} s" if seconds < 99.5 else str(datetime.timedelta(seconds=round(seconds)))


def _most_iterations(settings):
    return f"{'' if settings.maxit else 'at most '}{settings.most_iterations}"


def _report_iteration(iteration, settings):
    counts = np.array([c.count for c in iteration.classes])
    for k, c in enumerate(iteration.classes):
        if c.vanished:
            details.debug("class %d: vanished with %d particles%s", k, c.count,
                         f"; particle {c.members[0]} replaces it" if settings.vanished == "random" else "")
        else:
            fitted = f"; filter cutoff {c.filter.cutoff:.3f}, fall-off {c.filter.falloff:.3f}" if c.filter else ""
            alike = "" if c.like is None else f"; like class {c.like} ({c.likeness:.2f})"
            details.debug("class %d: %d particles%s; centre x %.3f, y %.3f; mean peak %.5g%s; detail %.2f", k, c.count,
                          fitted, *-c.shift, iteration.peak[iteration.assign == k].mean(), alike, c.detail)
    far = {k: float(np.hypot(*c.shift)) for k, c in enumerate(iteration.classes)
           if c.shift is not None and np.hypot(*c.shift) > settings.search.outer_radius / 4}
    if far:
        logger.warning("iteration %d: the centres of classes %s lie beyond a quarter of the radius (farthest %.1f px), "
                       "which a centring that fails looks like; center_limit leaves such an average where it is",
                       iteration.number, ", ".join(map(str, far)), max(far.values()))
    vanished = sum(c.vanished for c in iteration.classes)
    if vanished > len(counts) / 4 and not settings.local:
        unequal = not settings.normalize_references and settings.assignment != "likeliest"
        logger.warning("iteration %d: %d of %d classes have fewer than four particles%s: try %s", iteration.number,
                       vanished, len(counts), "; references of unequal contrast do this" if unequal else "",
                       ways_to_keep_classes(unequal, settings.vanished, settings.assignment, "fewer classes"))
    logger.info("iteration %d (%d of %s): criterion %.7g; classes %d/%d/%d (smallest/median/largest)%s; %.1f%% changed "
                "class; %.2f s, %.0f particles/s", iteration.number, iteration.number + 1,
                _most_iterations(settings), iteration.criterion, counts.min(),
                np.median(counts), counts.max(), f", {vanished} vanished" if vanished else "",
                100 * iteration.changed.mean(), iteration.seconds, len(iteration.assign) / iteration.seconds)
