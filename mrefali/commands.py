"""The commands: one plain function each, whose signature is the command line and whose docstring is the help.

Parameters before the ``*`` are positional, those after it are options; an annotation is int, float, bool or
str. In a docstring ``name : type, unit, range`` and the lines under it become one line of help. Nothing heavy
is imported outside a function: ``--help`` must never import numpy, numba, scipy or h5py.
"""

from mrefali.errors import InputError


def mref_ali2d(stack: str, refs: str, outdir: str, mask: str = None, *,
               ir: int = 1, ou: int = -1, rs: int = 1, xr: tuple = 0.0, yr: tuple = 0.0,
               ts: tuple = 1.0, center: int = 1, maxit: int = 10, CTF: bool = False, snr: float = 1.0,
               function: str = "ref_ali2d", rand_seed: int = 1000, MPI: bool = False,
               mirror: bool = True, subpixel: bool = False, lowpass: float = None, highpass: float = None,
               vanished: str = "random", center_limit: float = None, interpolation: str = "quadratic",
               normalize_references: bool = False, assignment: str = "best", threads: int = 0,
               max_memory: str = None, quiet: bool = False, check: bool = False, live: bool = False,
               resume: bool = False, save_every: int = 0, write_back: str = "journal"):
    """Align the particles of a stack to several references and average each class.

    OUTDIR gets the class averages (aqmIII.hdf), their FRC curves (drmIIIRRRR.txt), multi_ref.hdf and a log;
    the poses and classes go into the headers of STACK (xform.align2d, assign), whose pixels stay as they are;
    or into OUTDIR/particles.star, if STACK is no HDF or bdb, which no run writes to.
    The search is cut where the disc of radius ou would leave the n x n image: the whole of xr needs
    ou + xr <= n/2 - 1.

    Parameters
    ----------
    stack : str
        particles: square 2-D images; HDF and bdb with xform.align2d in their headers
    refs : str
        initial references, of the same box size
    outdir : str
        directory for the results; made here, must not exist unless resumed
    mask : str
        mask for normalisation and criterion; without it a disc of radius ou
    ir : int, px, 1 to ou
        first ring
    ou : int, px, ir to below n/2 - 1, or -1
        last ring; -1 stands for n//2 - 2
    rs : int, px, at least 1
        step from ring to ring
    xr : tuple, px, at least 0
        search in x, from -xr to xr; or one a stage
    yr : tuple, px, at least 0
        search in y, from -yr to yr; or one a stage
    ts : tuple, px, at least 0.01
        step of the search, may be below 1; or one a stage
    center : int, -1 to 4
        0 none, 1 phase, -1 mean shift, 2 mask, 3 rotational, 4 power
    maxit : int, at least 0
        iterations a stage; 0: at most 10, till the criterion falls
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    function : str, or FILE.py:NAME
        makes references of averages
    rand_seed : int
        seed of the draw that replaces a vanished class
    MPI : bool
        share the particles among the MPI ranks of mpiexec
    mirror : bool
        try mirrored particles too
    subpixel : bool
        refine what the search finds continuously in shift and angle
    lowpass : float, 1/px, above 0 to 0.5
        for the alignment alone; opens with the iterations
    highpass : float, 1/px, above 0 to 0.5
        for the alignment alone
    vanished : str, random, split, keep or reseed
        what becomes of a class of under 4
    center_limit : float, px, above 0
        an average whose centre lies farther out is left where it is
    interpolation : str, quadratic or fourier
        how particles are moved into the averages
    normalize_references : bool
        scale references to one standard deviation, so none wins by contrast
    assignment : str, best, likeliest, capped or equal
        how a particle gets its class
    threads : int, at least 0
        threads; 0 takes every core this process may use
    max_memory : str, such as 4GB
        memory each process may take; fewer particles are read at a time
    quiet : bool
        print warnings only
    check : bool
        validate, print estimates and search ranges in effect, stop
    live : bool
        write report.html after every iteration, not only at the end
    resume : bool
        go on with the run that the same call began
    save_every : int, at least 0
        write headers every so many iterations too; 0: at the end
    write_back : str, journal or copy
        change STACK in place, or put a copy there

    Examples
    --------
    mrefali mref_ali2d stack.hdf refs.hdf out --ou=27 --xr=3 --yr=3 --maxit=5
    mrefali mref_ali2d stack.hdf refs.hdf out mask.hdf --ou=27 --xr=3 --yr=3 --CTF --snr=0.3
    mrefali mref_ali2d stack.hdf refs.hdf out --ou=27 --xr=3 --yr=3 --maxit=5 --resume
    mrefali mref_ali2d stack.hdf refs.hdf out --ou=25 --xr="4 2" --yr="4 2" --ts="2 1" --subpixel
    """
    from mrefali.run import mref_ali2d

    mref_ali2d(stack, refs, outdir, mask, ir, ou, rs, xr, yr, ts, center, maxit, CTF, snr, function,
               rand_seed, MPI, mirror=mirror, subpixel=subpixel, lowpass=lowpass, highpass=highpass, vanished=vanished,
               center_limit=center_limit, interpolation=interpolation, normalize_references=normalize_references,
               assignment=assignment, threads=threads, max_memory=max_memory, quiet=quiet, check=check, live=live,
               resume=resume, save_every=save_every, write_back=write_back)


def classify(stack: str, outdir: str, mask: str = None, *,
             K: int, ir: int = 1, ou: int = -1, xr: float = -1.0, ts: float = 1.0, center: int = -1,
             maxit: int = 0, CTF: bool = False, snr: float = 1.0, function: str = "ref_ali2d",
             rand_seed: int = 1000, MPI: bool = False, mirror: bool = True, subpixel: bool = True,
             lowpass: float = None, highpass: float = None, vanished: str = "split",
             center_limit: float = None, interpolation: str = "quadratic", assignment: str = "likeliest",
             threads: int = 0, max_memory: str = None, quiet: bool = False, check: bool = False, live: bool = False,
             resume: bool = False, save_every: int = 0, write_back: str = "journal"):
    """From raw particles to class averages and poses, without references.

    Classes are found in 100 particles a class, 2000 at least, drawn at random; their averages are references of
    what is then mref_ali2d with other defaults, and references scaled to one standard deviation. Poses in the
    headers are ignored. There may be fewer classes than K: two of one view are made one. Output is that of
    mref_ali2d.

    Parameters
    ----------
    stack : str
        particles: square 2-D images, centred to within xr
    outdir : str
        directory for the results; made here, must not exist unless resumed
    mask : str
        mask for normalisation and criterion; without it a disc of radius ou
    K : int, at least 1
        classes at most; fewer where no more can be told apart
    ir : int, px, 1 to ou
        first ring
    ou : int, px, ir to below n/2 - 1, or -1
        last ring; -1: n//2 - 1 - xr
    xr : float, px, at least 0, or -1
        search in x and y; -1: a twentieth of the box
    ts : float, px, at least 0.01
        step of the search
    center : int, -1 to 4
        0 none, 1 phase, -1 mean shift, 2 mask, 3 rotational, 4 power
    maxit : int, at least 0
        iterations; 0: till 1 % change class, at most 10
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    function : str, or FILE.py:NAME
        makes references of averages
    rand_seed : int, at least 0
        seed of all that is drawn
    MPI : bool
        share the particles among MPI ranks; the first finds the references
    mirror : bool
        try mirrored particles too
    subpixel : bool
        refine what the search finds continuously in shift and angle
    lowpass : float, 1/px, above 0 to 0.5
        for the alignment alone; opens with the iterations
    highpass : float, 1/px, above 0 to 0.5
        for the alignment alone
    vanished : str, random, split, keep or reseed
        what becomes of a class of under 4
    center_limit : float, px, above 0
        an average whose centre lies farther out is left where it is
    interpolation : str, quadratic or fourier
        how particles are moved into the averages
    assignment : str, best, likeliest, capped or equal
        how a particle gets its class
    threads : int, at least 0
        threads; 0 takes every core this process may use
    max_memory : str, such as 4GB
        memory each process may take; fewer particles are read at a time
    quiet : bool
        print warnings only
    check : bool
        validate, print estimates and search ranges in effect, stop
    live : bool
        write report.html after every iteration, not only at the end
    resume : bool
        go on with the run that the same call began
    save_every : int, at least 0
        write headers every so many iterations too; 0: at the end
    write_back : str, journal or copy
        change STACK in place, or put a copy there

    Examples
    --------
    mrefali classify stack.hdf classes --K=8
    mrefali classify particles.star classes --K=50 --xr=6 --CTF
    """
    from mrefali.run import classify

    classify(stack, outdir, mask, K=K, ir=ir, ou=ou, xr=xr, ts=ts, center=center, maxit=maxit, CTF=CTF, snr=snr,
             function=function, rand_seed=rand_seed, MPI=MPI, mirror=mirror, subpixel=subpixel, lowpass=lowpass,
             highpass=highpass, vanished=vanished, center_limit=center_limit, interpolation=interpolation,
             assignment=assignment, threads=threads, max_memory=max_memory, quiet=quiet, check=check, live=live,
             resume=resume, save_every=save_every, write_back=write_back)


def seed(stack: str, refs: str, mask: str = None, *,
         K: int, ou: int = -1, xr: float = -1.0, center: int = -1, CTF: bool = False, snr: float = 1.0,
         rand_seed: int = 1000, mirror: bool = True, threads: int = 0, max_memory: str = None,
         quiet: bool = False):
    """Make references of unaligned particles: those that classify begins with.

    Parameters
    ----------
    stack : str
        particles: square 2-D images, centred to within xr; only read
    refs : str
        file of the references, HDF; must not exist
    mask : str
        mask for normalisation; without it a disc of radius ou
    K : int, at least 1
        references at most; fewer where no more can be told apart
    ou : int, px, 1 to below n/2 - 1, or -1
        radius of what is compared; -1: n//2 - 1 - xr
    xr : float, px, at least 0, or -1
        search in x and y; -1: a twentieth of the box
    center : int, -1 to 4
        0 none, 1 phase, -1 mean shift, 2 mask, 3 rotational, 4 power
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    rand_seed : int, at least 0
        seed of all that is drawn
    mirror : bool
        try mirrored particles too
    threads : int, at least 0
        threads; 0 takes every core this process may use
    max_memory : str, such as 4GB
        memory this process may take; fewer particles are read at a time
    quiet : bool
        print warnings only

    Examples
    --------
    mrefali seed stack.hdf refs.hdf --K=8
    """
    from mrefali.run import seed

    seed(stack, refs, mask, K=K, ou=ou, xr=xr, center=center, CTF=CTF, snr=snr, rand_seed=rand_seed, mirror=mirror,
         threads=threads, max_memory=max_memory, quiet=quiet)


def local_ali2d(stack: str, refs: str, outdir: str, mask: str = None, *,
                ir: int = 1, ou: int = -1, center: int = 4, maxit: int = 10, CTF: bool = False,
                snr: float = 1.0, function: str = "ref_ali2d", lowpass: float = None,
                highpass: float = None, center_limit: float = None, MPI: bool = False,
                threads: int = 0, max_memory: str = None, quiet: bool = False, check: bool = False,
                live: bool = False, resume: bool = False, save_every: int = 0,
                write_back: str = "journal"):
    """Refine poses continuously about their present values, each particle against its class.

    The poses and classes in the headers of STACK (xform.align2d, assign) are where it starts; class and mirror
    stay. With one image in REFS all particles are refined against that. A pose moves at most 2 px in an
    iteration. Output is that of mref_ali2d; a class of fewer than four particles keeps its reference.

    Parameters
    ----------
    stack : str
        particles: square 2-D images with xform.align2d and assign in their headers
    refs : str
        references that assign counts, or one for all; of the same box size
    outdir : str
        directory for the results; made here, must not exist unless resumed
    mask : str
        mask for normalisation and criterion; without it a disc of radius ou
    ir : int, px, 1 to ou
        inner radius of the pixels compared
    ou : int, px, ir to below n/2 - 1, or -1
        outer radius; -1 stands for n//2 - 2
    center : int, -1 to 4
        0 none, 1 phase, -1 mean shift, 2 mask, 3 rotational, 4 power
    maxit : int, at least 0
        iterations; 0 is at most 10, ended when the criterion falls
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    function : str, or FILE.py:NAME
        makes references of averages
    lowpass : float, 1/px, above 0 to 0.5
        for the alignment alone; opens with the iterations
    highpass : float, 1/px, above 0 to 0.5
        for the alignment alone
    center_limit : float, px, above 0
        an average whose centre lies farther out is left where it is
    MPI : bool
        share the particles among the MPI ranks of mpiexec
    threads : int, at least 0
        threads; 0 takes every core this process may use
    max_memory : str, such as 4GB
        memory each process may take; fewer particles are read at a time
    quiet : bool
        print warnings only
    check : bool
        validate, print estimates, stop
    live : bool
        write report.html after every iteration, not only at the end
    resume : bool
        go on with the run that the same call began
    save_every : int, at least 0
        write headers every so many iterations too; 0: at the end
    write_back : str, journal or copy
        change STACK in place, or put a copy there

    Examples
    --------
    mrefali local_ali2d stack.hdf out/multi_ref.hdf refined --ou=27 --maxit=3
    """
    from mrefali.run import local_ali2d

    local_ali2d(stack, refs, outdir, mask, ir=ir, ou=ou, center=center, maxit=maxit, CTF=CTF, snr=snr,
                function=function, lowpass=lowpass, highpass=highpass, center_limit=center_limit, MPI=MPI,
                threads=threads, max_memory=max_memory, quiet=quiet, check=check, live=live, resume=resume,
                save_every=save_every, write_back=write_back)


def ali2d(stack: str, outdir: str, mask: str = None, *,
          ir: int = 1, ou: int = -1, rs: int = 1, xr: tuple = (4.0, 2.0, 1.0, 1.0), yr: tuple = -1.0,
          ts: tuple = (2.0, 1.0, 0.5, 0.25), center: int = -1, maxit: int = 0, CTF: bool = False,
          snr: float = 1.0, function: str = "ref_ali2d", rand_seed: int = 1000, MPI: bool = False,
          mirror: bool = True, subpixel: bool = False, lowpass: float = None, highpass: float = None,
          center_limit: float = None, interpolation: str = "quadratic", threads: int = 0,
          max_memory: str = None, quiet: bool = False, check: bool = False, live: bool = False,
          resume: bool = False, save_every: int = 0, write_back: str = "journal"):
    """Align the particles of a stack to their own average, coarse to fine.

    No reference is given: the first is the average of all particles by the poses in the headers. Where all of
    those are the identity, each particle is turned by an angle drawn at random, so that nothing is aligned to
    an orientation that the images have in common. Output is that of mref_ali2d, with one class, 0.

    Parameters
    ----------
    stack : str
        particles: square 2-D images; HDF and bdb with xform.align2d in their headers
    outdir : str
        directory for the results; made here, must not exist unless resumed
    mask : str
        mask for normalisation and criterion; without it a disc of radius ou
    ir : int, px, 1 to ou
        first ring
    ou : int, px, ir to below n/2 - 1, or -1
        last ring; -1 stands for n//2 - 2
    rs : int, px, at least 1
        step from ring to ring
    xr : tuple, px, at least 0
        search in x, from -xr to xr; one a stage
    yr : tuple, px, at least 0, or -1
        search in y, likewise; -1: as xr
    ts : tuple, px, at least 0.01
        step of the search; one a stage
    center : int, -1 to 4
        0 none, 1 phase, -1 mean shift, 2 mask, 3 rotational, 4 power
    maxit : int, at least 0
        iterations a stage; 0: at most 10, till the criterion falls
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    function : str, or FILE.py:NAME
        makes references of averages
    rand_seed : int, at least 0
        seed of the angles that are drawn
    MPI : bool
        share the particles among the MPI ranks of mpiexec
    mirror : bool
        try mirrored particles too
    subpixel : bool
        refine what the search finds continuously in shift and angle
    lowpass : float, 1/px, above 0 to 0.5
        for the alignment alone; opens with the iterations
    highpass : float, 1/px, above 0 to 0.5
        for the alignment alone
    center_limit : float, px, above 0
        an average whose centre lies farther out is left where it is
    interpolation : str, quadratic or fourier
        how particles are moved into the averages
    threads : int, at least 0
        threads; 0 takes every core this process may use
    max_memory : str, such as 4GB
        memory each process may take; fewer particles are read at a time
    quiet : bool
        print warnings only
    check : bool
        validate, print estimates and search ranges in effect, stop
    live : bool
        write report.html after every iteration, not only at the end
    resume : bool
        go on with the run that the same call began
    save_every : int, at least 0
        write headers every so many iterations too; 0: at the end
    write_back : str, journal or copy
        change STACK in place, or put a copy there

    Examples
    --------
    mrefali ali2d stack.hdf aligned --ou=25
    mrefali ali2d stack.hdf aligned --ou=27 --xr="3 1" --ts="1 0.5" --maxit=4 --subpixel
    """
    from mrefali.run import ali2d

    ali2d(stack, outdir, mask, ir=ir, ou=ou, rs=rs, xr=xr, yr=yr, ts=ts, center=center, maxit=maxit, CTF=CTF, snr=snr,
          function=function, rand_seed=rand_seed, MPI=MPI, mirror=mirror, subpixel=subpixel, lowpass=lowpass,
          highpass=highpass, center_limit=center_limit, interpolation=interpolation, threads=threads,
          max_memory=max_memory, quiet=quiet, check=check, live=live, resume=resume, save_every=save_every,
          write_back=write_back)


def k_means(stack: str, outdir: str, mask: str = None, *,
            K: int, ou: int = -1, maxit: int = 100, trials: int = 10, rand_seed: int = 1000,
            CTF: bool = False, snr: float = 1.0, MPI: bool = False, threads: int = 0,
            max_memory: str = None, quiet: bool = False, write_back: str = "journal"):
    """Classify aligned particles by K-means of their pixels.

    The particles are normalised, moved by their poses (xform.align2d) and compared by their pixels under the
    mask. Their classes go into the headers of STACK (assign), the largest as 0; poses and pixels stay. Output
    is that of a run of mref_ali2d of one iteration. Wants scikit-learn: pip install 'mrefali[classify]'.

    Parameters
    ----------
    stack : str
        aligned particles, in any format
    outdir : str
        directory for the results; made here, must not exist
    mask : str
        pixels where it is above 0.5 are compared; without it a disc of radius ou
    K : int, 2 to the number of particles
        classes
    ou : int, px, 1 to below n/2 - 1, or -1
        radius of the disc; -1 stands for n//2 - 2
    maxit : int, at least 1
        iterations of a trial at most
    trials : int, at least 1
        random starts; the best one counts
    rand_seed : int, at least 0
        seed of the random starts
    CTF : bool
        multiply particles by the CTF in the headers, and weight averages by it
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    MPI : bool
        share the checks among the MPI ranks; the first alone classifies
    threads : int, at least 0
        threads, of which K-means takes one; 0: every core
    max_memory : str, such as 4GB
        memory allowed; else what the machine has; all pixels must fit
    quiet : bool
        print warnings only
    write_back : str, journal or copy
        change STACK in place, or put a copy there

    Examples
    --------
    mrefali k_means stack.hdf classes --K=8 --ou=27
    """
    from mrefali.clustering import k_means

    k_means(stack, outdir, mask, K=K, ou=ou, maxit=maxit, trials=trials, rand_seed=rand_seed, CTF=CTF, snr=snr, MPI=MPI,
            threads=threads, max_memory=max_memory, quiet=quiet, write_back=write_back)


def k_means_groups(stack: str, outdir: str, mask: str = None, *,
                   K1: int = 2, K2: int = 10, ou: int = -1, maxit: int = 100, trials: int = 10,
                   rand_seed: int = 1000, CTF: bool = False, MPI: bool = False, threads: int = 0,
                   max_memory: str = None, quiet: bool = False):
    """Run K-means for each of a range of K, and say which K three published criteria prefer.

    OUTDIR gets groups.csv, one line a K, a log and, with the extra [viz], groups.png: Calinski-Harabasz and
    Coleman (the largest is best) and Davies-Bouldin (the smallest). The headers of STACK stay as they are.
    Wants scikit-learn: pip install 'mrefali[classify]'.

    Parameters
    ----------
    stack : str
        aligned particles, in any format
    outdir : str
        directory for the results; made here, must not exist
    mask : str
        pixels where it is above 0.5 are compared; without it a disc of radius ou
    K1 : int, 2 to K2
        fewest classes
    K2 : int, K1 to below the number of particles
        most classes
    ou : int, px, 1 to below n/2 - 1, or -1
        radius of the disc; -1 stands for n//2 - 2
    maxit : int, at least 1
        iterations of a trial at most
    trials : int, at least 1
        random starts for each K; the best one counts
    rand_seed : int, at least 0
        seed of the random starts
    CTF : bool
        multiply particles by the CTF in the headers
    MPI : bool
        share the checks among the MPI ranks; the first alone classifies
    threads : int, at least 0
        threads, of which K-means takes one; 0: every core
    max_memory : str, such as 4GB
        memory allowed; else what the machine has; all pixels must fit
    quiet : bool
        print warnings only

    Examples
    --------
    mrefali k_means_groups stack.hdf groups --K1=2 --K2=12 --ou=27
    """
    from mrefali.clustering import k_means_groups

    k_means_groups(stack, outdir, mask, K1=K1, K2=K2, ou=ou, maxit=maxit, trials=trials, rand_seed=rand_seed, CTF=CTF,
                   MPI=MPI, threads=threads, max_memory=max_memory, quiet=quiet)


def simulate(out: str, *, n: int = 800, views: int = 8, box: int = 64, snr: float = 0.3,
             max_shift: float = 3.0, mirror: bool = True, sizes: str = "", pixel_size: float = 2.0,
             nearly_symmetric: bool = False, junk: float = 0.0, CTF: bool = False, seed: int = 0):
    """Make particles whose class and pose are known.

    Writes the particles (OUT.hdf), the truth (OUT_truth.csv) and the noise-free views (OUT_views.hdf).

    Parameters
    ----------
    out : str
        file of particles to write, OUT.hdf; must not exist
    n : int, at least one a view
        particles
    views : int, at least 1
        different views, the true classes
    box : int, px, at least 16
        side of an image
    snr : float, at least 1e-6
        variance of signal to variance of noise per pixel
    max_shift : float, px, at least 0
        largest shift in x and in y
    mirror : bool
        mirror half of the particles
    sizes : str, one number a view, such as 20,10,8
        relative sizes of the classes; else all equal
    pixel_size : float, A, above 0
        pixel size
    nearly_symmetric : bool
        views look nearly the same turned by 180 degrees
    junk : float, 0 to below 1
        share of particles that show no view
    CTF : bool
        multiply each particle by a CTF of its own
    seed : int, at least 0
        seed of everything random

    Examples
    --------
    mrefali simulate particles.hdf --n=2000 --views=3 --sizes=20,10,8 --snr=0.1
    """
    from mrefali.simulation import simulate

    simulate(out, n_particles=n, n_views=views, box=box, snr=snr, max_shift=max_shift, mirror=mirror,
             sizes=_parse_sizes(sizes) if sizes else None, pixel_size=pixel_size, seed=seed,
             nearly_symmetric=nearly_symmetric, junk=junk, CTF=CTF)
    stem = out.removesuffix(".hdf")
    print(f"{out}: {n} particles of {views} views, {box} x {box} px, SNR {snr:g}")
    print(f"{stem}_truth.csv: their true classes and poses")
    print(f"{stem}_views.hdf: the noise-free views")


def _parse_sizes(sizes):
    """``list`` of float from a text such as ``20,10,8``."""
    try:
        return [float(size) for size in sizes.split(",")]
    except ValueError:
        raise InputError(f"--sizes={sizes} is not allowed: give one number a view, such as 20,10,8") from None


def demo(outdir: str = "mrefali_demo", *, threads: int = 0):
    """Simulate a small stack, align it and compare what was found with the truth.

    Parameters
    ----------
    outdir : str
        directory for everything the demo writes; must not exist
    threads : int, at least 0
        threads; 0 takes every core this process may use
    """
    from mrefali.demonstration import demo

    demo(outdir, threads=threads)


def evaluate(stack: str, truth: str, *, classes: int = None, CTF: bool = False, json: bool = False):
    """Say how close the classes and poses of a stack come to the truth.

    The stack is one that simulate wrote and that was aligned since; OUT_views.hdf must be beside OUT_truth.csv.
    The bound is the smallest rms error possible where the views are known (Cramer-Rao).

    Parameters
    ----------
    stack : str
        aligned particles, with xform.align2d and assign in their headers
    truth : str
        OUT_truth.csv as simulate writes it
    classes : int, at least 1
        classes of the run; without it as many as views, or more if assign says so
    CTF : bool
        take the CTF in the headers into the averages and the bound
    json : bool
        print all of it as JSON, FRC curves included

    Examples
    --------
    mrefali evaluate particles.hdf particles_truth.csv
    """
    from mrefali.evaluation import evaluate

    found = evaluate(stack, truth, classes=classes, CTF=CTF).as_dict()
    if json:
        from json import dumps

        print(dumps(found, indent=1))
    else:
        _print_evaluation(found)


def _print_evaluation(found):
    def shown(value, form):
        return "unknown" if value is None else format(value, form)

    print(f"{found['particles']} particles, {found['junk']} of them junk, which counts nowhere below")
    print(f"right class        {found['class_share']:.1%} (matching {found['matching']}), "
          f"adjusted Rand index {found['adjusted_rand']:.3f}")
    print(f"of these, mirror   {found['mirror_share']:.1%} right")
    print(f"of these, gross    {found['gross_share']:.1%} off by more than 20 degrees or 4 px; of the others:")
    for name, unit in (("angle", "degrees"), ("shift", "px")):
        rms, median, bound, multiple = (shown(found[key], ".3f") for key in (
            f"{name}_error_rms", f"{name}_error_median", f"{name}_bound", f"{name}_multiple_of_bound"))
        print(f"{name} error        rms {rms}, median {median} {unit}; bound of the rms {bound}, {multiple} times that")
    print(f"empty classes      {found['empty_classes']}")
    print("class  particles  view  FRC of its average with the view above 0.5 down to, px")
    for c in found["classes"]:
        print(f"{c['class']:5}  {c['particles']:9}  {c['view'] if c['view'] >= 0 else '-':>4}  "
              f"{shown(c['resolution_px'], '.2f')}")


def null(stack: str, refs: str, outdir: str, mask: str = None, *,
         ir: int = 1, ou: int = -1, rs: int = 1, xr: float = 0.0, yr: float = 0.0, ts: float = 1.0,
         center: int = 1, maxit: int = 1, CTF: bool = False, snr: float = 1.0, function: str = "ref_ali2d",
         rand_seed: int = 1000, MPI: bool = False, mirror: bool = True, subpixel: bool = False,
         threads: int = 0, quiet: bool = False, check: bool = False):
    """Align noise with the spectrum of the particles to the same references.

    What correlation and FRC such noise reaches is bias alone; what the particles reach stands beside it, in
    OUTDIR/null.csv. OUTDIR/particles and OUTDIR/noise have the averages. The headers of STACK stay as they are.

    Parameters
    ----------
    stack : str
        particles, as for mref_ali2d
    refs : str
        references, as for mref_ali2d
    outdir : str
        directory for the results; made here, must not exist
    mask : str
        mask; without it a disc of radius ou
    ir : int, px, 1 to ou
        first ring
    ou : int, px, ir to below n/2 - 1, or -1
        last ring; -1 stands for n//2 - 2
    rs : int, px, at least 1
        step from ring to ring
    xr : float, px, at least 0
        search in x, from -xr to xr
    yr : float, px, at least 0
        search in y, from -yr to yr
    ts : float, px, at least 0.01
        step of the search
    center : int, -1 to 4
        as for mref_ali2d
    maxit : int, at least 0
        iterations; 0 is at most 10, ended when the criterion falls
    CTF : bool
        weight by the CTF in the headers
    snr : float, above 0
        signal-to-noise ratio of the Wiener term, used with --CTF
    function : str, or FILE.py:NAME
        makes references of averages
    rand_seed : int, at least 0
        seed of the noise
    MPI : bool
        share the particles among the MPI ranks of mpiexec
    mirror : bool
        try mirrored particles too
    subpixel : bool
        refine what the search finds continuously in shift and angle
    threads : int, at least 0
        threads; 0 takes every core this process may use
    quiet : bool
        print warnings only
    check : bool
        validate, print estimates and search ranges in effect, stop

    Examples
    --------
    mrefali null stack.hdf refs.hdf control --ou=27 --xr=3 --yr=3
    """
    from mrefali.control import null

    rows = null(stack, refs, outdir, mask, ir=ir, ou=ou, rs=rs, xr=xr, yr=yr, ts=ts, center=center, maxit=maxit,
                CTF=CTF, snr=snr, function=function, rand_seed=rand_seed, MPI=MPI, mirror=mirror, subpixel=subpixel,
                threads=threads, quiet=quiet, check=check)
    if rows and not quiet:
        _print_null([row for row in rows if row["iteration"] == rows[-1]["iteration"]])


def _print_null(rows):
    """One line a class, what noise reached in brackets."""
    print("particles (noise): count, correlation of the average with its reference, FRC above 0.143 down to, px")
    for row in rows:
        cells = [f"{row[name]:{form}} ({row[name + '_noise']:{form}})" if "" not in (row[name], row[name + "_noise"])
                 else "vanished" for name, form in (("count", "d"), ("correlation", ".3f"),
                                                    ("resolution_0.143_px", ".2f"))]
        print(f"class {row['class']}: {', '.join(cells)}")


def info(file: str):
    """Say what a stack or a file of class averages holds.

    Parameters
    ----------
    file : str
        stack or averages

    Examples
    --------
    mrefali info out/aqm009.hdf
    """
    from mrefali.information import info

    found = info(file)
    pixel_size = "pixel size unknown" if found.pixel_size_A is None else f"{found.pixel_size_A:g} A a pixel"
    size = "unequal or not square" if found.box is None else f"of {found.box} x {found.box} px"
    print(f"{file}: {found.n_images} images {size}, {pixel_size}")
    if found.obstacle is not None:
        print(f"alignment refuses them: {found.obstacle}")
    print("headers and the number of images that have them:")
    for name in sorted(found.headers):
        print(f"  {name:<20} {found.headers[name]}")
    if found.classes is not None:
        print("particles of each class:")
        for assign, count in found.classes.items():
            print(f"  {assign:<20} {count}")
        if found.without_class:
            print(f"  {'no class yet':<20} {found.without_class}")
        if found.not_a_class:
            print(f"  {'not a number':<20} {found.not_a_class}")
    if found.averages is not None:
        print("particles in each class average:")
        for average, ave_n in enumerate(found.averages):
            print(f"  {average:<20} {'unknown' if ave_n is None else ave_n}")


def header(stack: str, *, params: str, zero: bool = False, one: bool = False, consecutive: bool = False,
           randomize: bool = False, import_: str = None, export: str = None, print_: bool = False,
           rand_seed: int = 1000):
    """Set, import, export or print headers of every image of a stack.

    Exactly one action. A table has one row an image and the columns of the headers in the order of params:
    alpha sx sy mirror scale for xform.align2d; defocus cs voltage apix bfactor ampcont dfdiff dfang for ctf; one
    for all else. A table with commas names its columns in its first line; so a run is undone by importing
    xform.align2d from OUTDIR/poses_before.csv.

    Parameters
    ----------
    stack : str
        stack whose headers are set or read; its pixels stay as they are
    params : str, such as xform.align2d,assign
        names of headers
    zero : bool
        set to 0, poses to the identity
    one : bool
        set to 1
    consecutive : bool
        number from 0
    randomize : bool
        poses only: any angle, shifts in +-2 px, half of them mirrored
    import_ : str
        table to read
    export : str
        table to write; must not exist
    print_ : bool
        print the table
    rand_seed : int, at least 0
        seed of --randomize: the same seed, the same poses

    Examples
    --------
    mrefali header stack.hdf --params=xform.align2d --zero
    mrefali header stack.hdf --params=xform.align2d,assign --export=params.txt
    mrefali header stack.hdf --params=xform.align2d --import=out/poses_before.csv
    """
    from mrefali.headers import header

    header(stack, params, zero=zero, one=one, consecutive=consecutive, randomize=randomize, import_=import_,
           export=export, print_=print_, rand_seed=rand_seed)


def transform2d(stack: str, out: str, *, interpolation: str = "quadratic"):
    """Apply the poses of a stack to its pixels, into a new stack.

    The new poses are the identity; all other headers are carried over.

    Parameters
    ----------
    stack : str
        images with xform.align2d in their headers
    out : str
        file to write; must not exist
    interpolation : str, quadratic or fourier
        how values between pixels are found

    Examples
    --------
    mrefali transform2d stack.hdf aligned.hdf --interpolation=fourier
    """
    from mrefali.transforms import transform2d

    transform2d(stack, out, interpolation=interpolation)


def convert(source: str, out: str, *, bin: int = 1, invert: bool = False, normalize: bool = False):
    """Write a stack anew in another format.

    The name of OUT chooses: .hdf, bdb:DIR#NAME, .mrcs, .spi, .npy, or .star, with its pixels in a .mrcs beside
    it unless they are in such a file already. Poses, classes, CTFs, pixel size and columns go along; a line says
    what the format has no place for.

    Parameters
    ----------
    source : str
        stack in any format; stays as it is
    out : str
        file to write; must not exist
    bin : int, at least 1
        make pixels so many times as large
    invert : bool
        turn dark into bright
    normalize : bool
        background, outside 3/8 of the box, to mean 0 and deviation 1

    Examples
    --------
    mrefali convert particles.star particles.hdf --bin=2
    mrefali convert J12_particles.cs particles.star
    """
    from mrefali.conversion import convert

    convert(source, out, bin=bin, invert=invert, normalize=normalize)


def select(source: str, out: str, *, classes: str = "", min_size: int = None, min_frc: float = None):
    """Write the particles of some classes as a new stack or STAR.

    Each condition given must hold.

    Parameters
    ----------
    source : str
        output directory of a run, or a stack whose particles have classes
    out : str
        file to write, in the format of its name as for convert; must not exist
    classes : str, numbers such as 1,4
        these classes, counted from 0
    min_size : int, at least 1
        those of so many particles
    min_frc : float, 1/px, above 0 to 0.5
        those whose FRC stays above 0.5 up to this frequency

    Examples
    --------
    mrefali select out chosen.star --classes=1,4
    mrefali select out chosen.hdf --min_size=200 --min_frc=0.1
    """
    from mrefali.conversion import select

    chosen = select(source, out, classes=_parse_classes(classes) if classes else None, min_size=min_size,
                    min_frc=min_frc)
    print(f"classes {', '.join(map(str, chosen))}")


def _parse_classes(classes):
    """``list`` of int from a text such as ``1,4``."""
    try:
        return [int(number) for number in classes.split(",")]
    except ValueError:
        raise InputError(f"--classes={classes} is not allowed: give numbers such as 1,4") from None


def recenter(source: str, out: str):
    """Fold shifts into the coordinates of a STAR, to extract the particles again.

    Coordinates change by whole pixels of the micrographs; the rest stays in the origins.

    Parameters
    ----------
    source : str
        STAR with coordinates and origins, such as OUTDIR/particles.star
    out : str
        STAR to write; must not exist

    Examples
    --------
    mrefali recenter out/particles.star recentered.star
    """
    from mrefali.conversion import recenter

    recenter(source, out)


def report(outdir: str):
    """Make the page of a run: class averages, curves, warnings and members, to open in a browser.

    Writes OUTDIR/report.html, one file that needs no network; it can be mailed. A run writes it at its end.

    Parameters
    ----------
    outdir : str
        directory of a run, finished or at work

    Examples
    --------
    mrefali report out
    """
    from mrefali.page import report

    report(outdir)


def watch(outdir: str, *, every: float = 2.0, once: bool = False):
    """Show the state of a run from another terminal, until it ends.

    Iterations, time left, class sizes and warnings, read from the files of the run, which is not touched.

    Parameters
    ----------
    outdir : str
        directory of a run
    every : float, s, above 0
        time between two looks
    once : bool
        look once; so it is in a file or a pipe

    Examples
    --------
    mrefali watch out
    """
    from mrefali.watching import watch

    watch(outdir, every=every, once=once)


def montage(file: str, out: str, *, order: str = "size", columns: int = 0, most: int = 400):
    """Make one picture of the images of a file, or of the class averages of a run.

    Below each stands its number; for class averages the particles too, for a run also their share and the
    resolution at an FRC of 0.5 and 0.143.

    Parameters
    ----------
    file : str
        stack, file of class averages, or directory of a run
    out : str
        picture to write, OUT.png; must not exist
    order : str, size or number
        by size of the class, where there are sizes, or by number
    columns : int, at least 0
        columns; 0 chooses
    most : int, at least 1
        images shown at most, the first ones

    Examples
    --------
    mrefali montage out classes.png
    mrefali montage out/aqm003.hdf classes.png --order=number
    """
    from mrefali.sheets import montage

    montage(file, out, order=order, columns=columns, most=most)


#: Every command, in the order of the help.
COMMANDS = (mref_ali2d, classify, seed, local_ali2d, ali2d, k_means, k_means_groups, simulate, demo, evaluate, null,
            info, header, transform2d, convert, select, recenter, report, watch, montage)
