"""Small files of each format, made without the package: by mrcfile, struct, numpy, and as literal text."""

import struct

import mrcfile
import numpy as np

BOX = 16

#: Images that no turn, flip or transposition leaves as they are.
IMAGES = np.random.default_rng(3).standard_normal((7, BOX, BOX)).astype(np.float32)


def write_mrc(path, images=IMAGES, pixel_size_A=None, space_group=0):
    """An MRC stack; the space group is set afterwards, whatever mrcfile thinks of it."""
    with mrcfile.new(path, images, overwrite=True) as file:
        file.set_image_stack()
        if pixel_size_A is not None:
            file.voxel_size = pixel_size_A
        file.header.ispg = space_group
    return str(path)


OPTICS = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnMicrographOriginalPixelSize #7
1 first 300 2.7 0.1 2.5 1.25
2 second 200 1.4 0.07 2.5 1.25
"""

PARTICLES = """
# version 30001

data_particles

loop_
_rlnImageName #1
_rlnMicrographName #2
_rlnCoordinateX #3
_rlnCoordinateY #4
_rlnOpticsGroup #5
_rlnDefocusU #6
_rlnDefocusV #7
_rlnDefocusAngle #8
_rlnPhaseShift #9
_rlnAngleRot #10
_rlnAngleTilt #11
_rlnAnglePsi #12
_rlnOriginXAngst #13
_rlnOriginYAngst #14
_rlnClassNumber #15
000003@Extract/b.mrcs 'mic b.mrc' 100.0 200.0 1 21000 19000 35 0 0 0 -30 5.5801 0.3349 2
000001@Extract/a.mrcs mic_a.mrc 101.5 50.25 2 15000 15000 0 20 180 180 150 5.5801 0.3349 1
000002@Extract/b.mrcs 'mic b.mrc' 7 8 2 16000 15900 -10 0 0 0 0 -2.4 3.7 2
"""


def write_star(folder, text=OPTICS + PARTICLES, pixel_size_A=2.5):
    """``particles.star`` in ``folder/Select``, and beside that ``Extract/a.mrcs`` of 3 images and ``b.mrcs`` of 4."""
    (folder / "Select").mkdir()
    (folder / "Extract").mkdir()
    write_mrc(folder / "Extract/a.mrcs", IMAGES[:3], pixel_size_A)
    write_mrc(folder / "Extract/b.mrcs", IMAGES[3:], pixel_size_A)
    path = folder / "Select/particles.star"
    path.write_text(text)
    return str(path)


#: The images that the particles of ``PARTICLES`` are, in their order.
STAR_IMAGES = IMAGES[[5, 0, 4]]

UIDS = np.array([900, 17, 2**63 + 5], np.uint64)

CS_MAIN = [("uid", "<u8"), ("alignments2D/pose", "<f4"), ("alignments2D/shift", "<f4", (2,)),
           ("alignments2D/psize_A", "<f4"), ("alignments2D/class", "<u4")]
CS_BLOB = [("blob/path", "S20"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)), ("blob/psize_A", "<f4"),
           ("blob/sign", "<f4")]
CS_REST = [("ctf/df1_A", "<f4"), ("ctf/df2_A", "<f4"), ("ctf/df_angle_rad", "<f4"), ("ctf/accel_kv", "<f4"),
           ("ctf/cs_mm", "<f4"), ("ctf/amp_contrast", "<f4"), ("ctf/phase_shift_rad", "<f4"),
           ("location/micrograph_path", "S10"), ("location/micrograph_shape", "<u4", (2,)),
           ("location/center_x_frac", "<f4"), ("location/center_y_frac", "<f4"), ("ctf/anisomag", "<f4", (4,))]


def cs_records(sign=-1):
    """Three particles of J5/a.mrc, all that cryoSPARC knows of them."""
    records = np.zeros(3, CS_MAIN + CS_BLOB + CS_REST)
    records["uid"] = UIDS
    records["alignments2D/pose"] = np.deg2rad([-30, 0, 90])
    records["alignments2D/shift"] = [(2.2320508, 0.1339746), (1, 0), (0, 0)]
    records["alignments2D/psize_A"] = 5  # twice the blob's: the job worked on smaller images
    records["alignments2D/class"] = [0, 3, 1]
    records["blob/path"], records["blob/idx"] = b">J5/a.mrc", [2, 0, 1]
    records["blob/shape"], records["blob/psize_A"], records["blob/sign"] = BOX, 2.5, sign
    records["ctf/df1_A"], records["ctf/df2_A"], records["ctf/df_angle_rad"] = 21000, 19000, np.deg2rad(35)
    records["ctf/accel_kv"], records["ctf/cs_mm"], records["ctf/amp_contrast"] = 300, 2.7, 0.1
    records["ctf/phase_shift_rad"] = [0, np.pi / 2, 0]
    records["location/micrograph_path"], records["location/micrograph_shape"] = b"m.mrc", (4000, 6000)
    records["location/center_x_frac"], records["location/center_y_frac"] = 0.25, 0.5
    return records


def save_cs(path, records):
    with open(path, "wb") as file:
        np.save(file, records)
    return str(path)


def write_cs(folder, records=None):
    """``J12/particles.cs``, its images in ``J5/a.mrc``, which calls itself a volume."""
    (folder / "J12").mkdir()
    (folder / "J5").mkdir()
    write_mrc(folder / "J5/a.mrc", IMAGES[:3], space_group=1)
    return save_cs(folder / "J12/particles.cs", cs_records() if records is None else records)


def spider_header(order, box, **words):
    """A header of SPIDER, its words numbered from 1 as in the manual: ``w12=16`` is the row length."""
    n_records = -(-1024 // (4 * box))
    values = [0.0] * (n_records * box)
    filled = {"w1": 1, "w2": box, "w3": n_records + box, "w5": 1, "w12": box, "w13": n_records,
              "w22": 4 * n_records * box, "w23": 4 * box} | words
    for word, value in filled.items():
        values[int(word[1:]) - 1] = float(value)
    return struct.pack(f"{order}{len(values)}f", *values)


def write_spider(path, images=IMAGES, order="<", pixel_size_A=0.0):
    """A SPIDER stack."""
    box = images.shape[-1]
    parts = [spider_header(order, box, w24=2, w26=len(images), w38=pixel_size_A)]
    for i, image in enumerate(images):
        parts += [spider_header(order, box, w27=i + 1), image.astype(f"{order}f4").tobytes()]
    path.write_bytes(b"".join(parts))
    return str(path)
