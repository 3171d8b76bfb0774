"""Pack the golden databases into ``databases.zip`` beside this file: ``python make.py GOLDEN_BDB_FOLDER``.

Only what Berkeley DB keeps; the pixels are those of the golden cases, and ``test_io_bdb.py`` writes them anew.
"""

import sys
import zipfile
from pathlib import Path

NAMES = ("py3/stack", "py3/ctfstack", "py3/vstack", "py3/mrcsstack", "py3/mrcssub", "py3/odd", "py3_after/stack",
         "py2/ctfstack", "py2/vstack", "py2/mixed")


def main(golden):
    with zipfile.ZipFile(Path(__file__).with_name("databases.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, name in (name.split("/") for name in NAMES):
            member = f"{folder}/EMAN2DB/{name}.bdb"
            archive.writestr(zipfile.ZipInfo(member), (golden / member).read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
