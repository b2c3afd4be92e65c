"""Facts about the tables of SAFLEX's Table 2: files, columns, classes, licences, caveats.

Imports nothing but the standard library, so that listing the sets costs no time. What Ding et al.
print about them in their Table 5 stands beside what the files hold; both were counted from the
files whose MD5 is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

SAFLEX = "Ding et al., SAFLEX, ICLR 2024, Table 5"
KDD_COLUMNS = (
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot "
    "num_failed_logins logged_in num_compromised root_shell su_attempted num_root "
    "num_file_creations num_shells num_access_files num_outbound_cmds is_host_login is_guest_login "
    "count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate same_srv_rate "
    "diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count dst_host_same_srv_rate "
    "dst_host_diff_srv_rate dst_host_same_src_port_rate dst_host_srv_diff_host_rate "
    "dst_host_serror_rate dst_host_srv_serror_rate dst_host_rerror_rate dst_host_srv_rerror_rate "
    "connection"
)


class Reading(NamedTuple):
    """What the name of a benchmark says about how its table is read."""

    target: str = ""
    categorical: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    header: bool = True
    dedup: bool = False
    rows: int = 0
    id: str = ""
    version: int = 1


@dataclass(frozen=True)
class Published:
    """What a paper says about a table."""

    rows: int
    features: int
    positives: int


@dataclass(frozen=True)
class TableEntry:
    """The facts about one table.

    ``positives`` are the values of the target that make the second class; without them each value
    is a class. ``names`` are those of the columns of a file without a header; empty: their numbers.
    ``md5`` is that of the file that these facts were counted from; empty where we have not seen it.
    """

    name: str
    file: str
    where: str
    md5: str
    target: str
    positives: tuple[str, ...]
    classes: tuple[str, ...]
    rows: int
    features: int
    published: Published
    licence: str
    source: str
    caveats: tuple[str, ...] = ()
    header: bool = True
    names: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


TABLES: Mapping[str, TableEntry] = {
    entry.name: entry
    for entry in (
        TableEntry(
            name="arrhythmia",
            file="arrhythmia.data",
            where="https://archive.ics.uci.edu/dataset/5/arrhythmia",
            md5="821c372c8c8886e29c9586fd1b81eb42",
            target="279",
            positives=("3", "4", "5", "7", "8", "9", "14", "15"),
            classes=("common", "rare"),
            rows=452,
            features=279,
            published=Published(452, 226, 66),
            licence="CC BY 4.0",
            source="Guvenir et al., Computers in Cardiology, 1997; UCI Machine Learning Repository",
            header=False,
            caveats=(
                "the classes of fewer than 16 rows are merged, as the Outlier Detection Datasets "
                "(ODDS) do: 66 positives, as published; how the published 226 features were chosen "
                "is not known",
                "tiny: a fifth for testing has 13 positives",
            ),
        ),
        TableEntry(
            name="click",
            file="click_prediction_small.csv",
            where="https://www.openml.org/d/1216 (Click_prediction_small)",
            md5="d98d2dfd62a63ad88ef4525d76e5f648",
            target="click",
            positives=("1",),
            classes=("no click", "click"),
            rows=39948,
            features=11,
            published=Published(39948, 12, 6728),
            licence="none stated",
            source="KDD Cup 2012, track 2",
            categorical=(
                "ad_id",
                "advertiser_id",
                "keyword_id",
                "title_id",
                "description_id",
                "user_id",
            ),
            caveats=(
                "the published 12 features, 7 of them categories, count the target: 11 and 6 are "
                "left; url_hash and query_id are numbers there, and here",
            ),
        ),
        TableEntry(
            name="qsar",
            file="biodeg.csv",
            where="https://archive.ics.uci.edu/dataset/254/qsar+biodegradation",
            md5="72bb5d19099965a38e0ca04565cb03c9",
            target="experimental_class",
            positives=("RB",),
            classes=("not biodegradable", "biodegradable"),
            rows=1055,
            features=41,
            published=Published(1055, 41, 356),
            licence="CC BY 4.0",
            source="Mansouri et al., J. Chem. Inf. Model. 53, 2013; UCI ML Repository",
        ),
        TableEntry(
            name="appetency",
            file="kddcup.data_10_percent.gz",
            where="http://kdd.ics.uci.edu/databases/kddcup99/kddcup99.html",
            md5="aef2e2f207a408ad7a36323a511f195f",
            target="connection",
            positives=("normal.",),
            classes=("attack", "normal"),
            rows=494021,
            features=41,
            published=Published(494021, 39, 97278),
            licence="none stated",
            source="KDD Cup 1999, the file of 10 per cent; UCI KDD Archive",
            header=False,
            names=tuple(KDD_COLUMNS.split()),
            categorical=("protocol_type", "service", "flag"),
            caveats=(
                "not the Appetency set of the KDD Cup 2009: the published counts are those of the "
                "10 per cent file of the KDD Cup 1999, without two columns that are constant",
                "348,435 of its 494,021 rows are copies of others (dedup=true leaves them out), so "
                "rows of test are in train",
            ),
        ),
        TableEntry(
            name="shrutime",
            file="Churn_Modelling.csv",
            where="https://www.kaggle.com/datasets/shrutimechlearn/churn-modelling",
            md5="",
            target="Exited",
            positives=("1",),
            classes=("stayed", "left"),
            rows=10000,
            features=11,
            published=Published(10000, 11, 2037),
            licence="CC0",
            source="Churn modelling data set, Kaggle",
            categorical=("Surname", "Geography", "Gender"),
            drop=("RowNumber", "CustomerId"),
            caveats=(
                "with the surname as a category: only so are 3 of 11 features categories, as "
                "published",
            ),
        ),
        TableEntry(
            name="credit",
            file="creditcard.csv",
            where="https://www.kaggle.com/datasets/mlg-ulb/creditcardfraud",
            md5="",
            target="Class",
            positives=("1",),
            classes=("genuine", "fraud"),
            rows=284807,
            features=30,
            published=Published(284807, 29, 492),
            licence="DbCL 1.0",
            source="Dal Pozzolo et al., IEEE SSCI, 2015",
            drop=("Time",),
        ),
        TableEntry(
            name="volkert",
            file="volkert.csv",
            where="https://www.openml.org/d/41166 (volkert), saved as CSV",
            md5="",
            target="class",
            positives=(),
            classes=(),
            rows=58310,
            features=180,
            published=Published(58310, 147, 0),
            licence="none stated",
            source="Guyon et al., ChaLearn AutoML challenge, 2019",
            caveats=("how the published 147 features were chosen is not known",),
        ),
    )
}
