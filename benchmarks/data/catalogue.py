"""Facts about the official data sets: files, checksums, counts, class names, licences, caveats.

Imports nothing but the standard library, so that listing the sets costs no time.
Source of the MedMNIST facts: the table INFO of the package medmnist 3.0.2 (record 10519652 of
Zenodo, v3); a test compares them one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["multi-class", "binary-class", "ordinal-regression", "multi-label"]

ZENODO = "https://zenodo.org/records/10519652/files"
TORONTO = "https://www.cs.toronto.edu/~kriz"
STANFORD = "http://ufldl.stanford.edu/housenumbers"
MEDMNIST_SIZES = (28, 64, 128, 224)

CLINICAL = "not for clinical use"
TINY = "tiny: scores move by several points from seed to seed"
PREVALENCE = "prevalence shift: class shares of test differ from those of train and validation"
VIEWS = "OrganA, OrganC and OrganS are views of the same scans: not independent sets"
DUPLICATES = "near-duplicates between train and test (Barz & Denzler, ciFAIR, 2020)"

ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; "
    "lung-right; pancreas; spleen"
)
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)


@dataclass(frozen=True)
class File:
    """One file of a data set: its official name, where it is published, its MD5 (32 hex digits)."""

    name: str
    url: str
    md5: str


@dataclass(frozen=True)
class Entry:
    """The facts about one official data set.

    `sizes` are edge lengths in pixels, `counts` the rows of (train, val, test) as published (a val
    of 0 is cut from train when the set is loaded), `files` the files of each size, `folder` the
    folder below the data root where they are kept, `source` the citation in one line, `caveats`
    what a reader of a table must know.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    channels: int
    sizes: tuple[int, ...]
    counts: tuple[int, int, int]
    files: Mapping[int, tuple[File, ...]]
    licence: str
    source: str
    caveats: tuple[str, ...]
    folder: str


def _medmnist(
    name: str,
    kind: Kind,
    channels: int,
    counts: tuple[int, int, int],
    md5s: str,
    classes: str,
    *caveats: str,
    licence: str = "CC BY 4.0",
) -> Entry:
    """One 2D MedMNIST set; `md5s` belong to MEDMNIST_SIZES, in order."""
    files = {}
    for size, md5 in zip(MEDMNIST_SIZES, md5s.split(), strict=True):
        file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
        files[size] = (File(file, f"{ZENODO}/{file}?download=1", md5),)
    return Entry(
        name=name,
        kind=kind,
        classes=tuple(classes.split("; ")),
        channels=channels,
        sizes=MEDMNIST_SIZES,
        counts=counts,
        files=files,
        licence=licence,
        source="Yang et al., MedMNIST v2, Scientific Data 10:41, 2023",
        caveats=(*caveats, CLINICAL),
        folder="medmnist",
    )


def _cifar(name: str, classes: str, archive: str, md5: str) -> Entry:
    """One of the two CIFAR sets, from its binary archive."""
    return Entry(
        name=name,
        kind="multi-class",
        classes=tuple(classes.split()),
        channels=3,
        sizes=(32,),
        counts=(50000, 0, 10000),
        files={32: (File(archive, f"{TORONTO}/{archive}", md5),)},
        licence="none stated",
        source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        caveats=(DUPLICATES,),
        folder="cifar",
    )


_ENTRIES = (
    Entry(
        name="digits",
        kind="multi-class",
        classes=tuple("0123456789"),
        channels=1,
        sizes=(28,),
        counts=(600, 300, 897),
        files={28: ()},
        licence="CC BY 4.0",
        source="Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the part "
        "that ships with scikit-learn)",
        caveats=("8x8 images scaled to 28x28; our own split: the same writers in train and test",),
        folder="digits",
    ),
    _medmnist(
        "pathmnist",
        "multi-class",
        3,
        (89996, 10004, 7180),
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 "
        "ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec",
        "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
        "cancer-associated stroma; colorectal adenocarcinoma epithelium",
        "test from another centre",
        "JPEG artefacts and colour differ from class to class",
    ),
    _medmnist(
        "chestmnist",
        "multi-label",
        1,
        (78468, 11219, 22433),
        "02c8a6516a18b556561a56cbdd36c4a8 9de6cd0b934ebb5b7426cfba5efbae16 "
        "db107e5590b27930b62dbaf558aebee3 45bd33e6f06c3e8cdb481c74a89152aa",
        "atelectasis; cardiomegaly; effusion; infiltration; mass; nodule; pneumonia; pneumothorax; "
        "consolidation; edema; emphysema; fibrosis; pleural; hernia",
        "accuracy says nothing: predicting no finding at all scores .947",
    ),
    _medmnist(
        "dermamnist",
        "multi-class",
        3,
        (7007, 1003, 2005),
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f "
        "2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d",
        "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; "
        "benign keratosis-like lesions; dermatofibroma; melanoma; melanocytic nevi; "
        "vascular lesions",
        "the same lesion in train and test",
        "licence CC BY-NC 4.0: no commercial use",
        licence="CC BY-NC 4.0",
    ),
    _medmnist(
        "octmnist",
        "multi-class",
        1,
        (97477, 10832, 1000),
        "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf "
        "0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3",
        "choroidal neovascularization; diabetic macular edema; drusen; normal",
        PREVALENCE,
    ),
    _medmnist(
        "pneumoniamnist",
        "binary-class",
        1,
        (4708, 524, 624),
        "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 "
        "05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1",
        "normal; pneumonia",
        PREVALENCE,
    ),
    _medmnist(
        "retinamnist",
        "ordinal-regression",
        3,
        (1080, 120, 400),
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc "
        "e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348",
        "0; 1; 2; 3; 4",
        TINY,
    ),
    _medmnist(
        "breastmnist",
        "binary-class",
        1,
        (546, 78, 156),
        "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 "
        "363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b",
        "malignant; normal, benign",
        TINY,
    ),
    _medmnist(
        "bloodmnist",
        "multi-class",
        3,
        (11959, 1712, 3421),
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b "
        "adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601",
        "basophil; eosinophil; erythroblast; "
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes); "
        "lymphocyte; monocyte; neutrophil; platelet",
    ),
    _medmnist(
        "tissuemnist",
        "multi-class",
        1,
        (165466, 23640, 47280),
        "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 "
        "61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c",
        "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; "
        "Glomerular endothelial cells; Interstitial endothelial cells; Leukocytes; Podocytes; "
        "Proximal Tubule Segments; Thick Ascending Limb",
    ),
    _medmnist(
        "organamnist",
        "multi-class",
        1,
        (34561, 6491, 17778),
        "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 "
        "eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170",
        ORGANS,
        VIEWS,
    ),
    _medmnist(
        "organcmnist",
        "multi-class",
        1,
        (12975, 2392, 8216),
        "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 "
        "773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1",
        ORGANS,
        VIEWS,
    ),
    _medmnist(
        "organsmnist",
        "multi-class",
        1,
        (13932, 2452, 8827),
        "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 "
        "ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1",
        ORGANS,
        VIEWS,
    ),
    _cifar("cifar10", CIFAR10, "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    _cifar("cifar100", CIFAR100, "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    Entry(
        name="svhn",
        kind="multi-class",
        classes=tuple("0123456789"),
        channels=3,
        sizes=(32,),
        counts=(73257, 0, 26032),
        files={
            32: tuple(
                File(name, f"{STANFORD}/{name}", md5)
                for name, md5 in (
                    ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                    ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
                )
            )
        },
        licence="non-commercial use only",
        source="Netzer et al., Reading Digits in Natural Images with Unsupervised Feature "
        "Learning, NIPS workshop, 2011",
        caveats=("licence: non-commercial use only",),
        folder="svhn",
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
