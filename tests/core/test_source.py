import re

import pytest

from normscope.core.errors import ArgumentError
from normscope.core.source import ALIASES, FURTHER, cite, readable
from normscope.core.survey import works

# what the address of each work contains, mostly its arXiv number, written down here independently of the tables
ADDRESS = {
    "glorot2010": "glorot10a",
    "ioffe2015": "1502.03167",
    "summers2020": "1906.03548",
    "ioffe2017": "1702.03275",
    "wu2021": "2105.07576",
    "yang2019": "1902.08129",
    "nado2020": "2006.10963",
    "li2016": "1603.04779",
    "lecun1998": "yann.lecun.com",
    "huang2020layerwise": "2002.10801",
    "daneshmand2020": "2003.01652",
    "martens2015": "1503.05671",
    "saxe2014": "1312.6120",
    "he2015delving": "1502.01852",
    "chen2016": "1604.06174",
    "mhammedi2017": "1612.00188",
    "yoshida2017": "1705.10941",
    "lezcano2019": "1909.09501",
    "schoenholz2017": "1611.01232",
    "ba2016": "1607.06450",
    "vanlaarhoven2017": "1706.05350",
    "liu2017": "1708.06519",
    "hanin2018": "1803.01719",
    "micikevicius2018": "1710.03740",
    "mccandlish2018": "1812.06162",
    "lu2019": "1903.06733",
    "luther2019": "1902.04942",
    "huang2020": "2009.12836",
    "schneider2020": "85690f81aadc1749175c187784afc9ee",
    "dettmers2022": "2208.07339",
    "kosson2023": "2305.17212",
    "wortsman2023": "2309.14322",
    "zhai2023": "2303.06296",
    "dehghani2023": "2302.05442",
    "kimi2025": "2507.20534",
    "sun2024": "2402.17762",
    "gatys2016": "CVPR.2016.265",
    "lanczos1950": "jres.045.026",
    "daniel1976": "0431641",
    "hutchinson1989": "03610918908812806",
    "pearlmutter1994": "neco.1994.6.1.147",
    "wu2000": "S0895479898334605",
    "schraudolph2002": "08997660260028683",
    "bekas2007": "apnum.2007.01.003",
    "lin2016": "1308.5467",
    "ghorbani2019": "1901.10159",
    "santurkar2018": "1805.11604",
    "cohen2021": "2103.00065",
    "cohen2022": "2207.14484",
    "martens2020": "1412.1193",
    "yao2020": "1912.07145",
    "meyer2021": "2010.09649",
    "epperly2024": "2301.07825",
    "pan2018": "1807.09441",
    "nguyen2019": "1910.05895",
    "henry2020": "2010.04245",
    "bernstein2020": "2002.03432",
    "pascanu2013": "1211.5063",
    "zhang2019": "1901.09321",
    "zamirai2020": "2010.06192",
    "wang2024": "2405.13698",
    "singh2020": "1911.09737",
    "zhao2020": "1909.12223",
    "ding2021": "2105.13290",
    "tang2021": "2102.02811",
    "touvron2021": "2103.17239",
    "peebles2022": "2212.09748",
    "wang2022": "2203.00555",
    "qin2023": "2307.14995",
    "sun2023": "2307.08621",
    "woo2023": "2301.00808",
    "dao2024": "2405.21060",
    "loshchilov2024": "2410.01131",
    "cai2025": "2510.22777",
    "chen2025": "2512.10938",
    "kim2025": "2502.02732",
    "sun2025": "2502.05795",
    "zhu2025": "2503.10622",
    "kingma2015": "1412.6980",
    "goyal2017": "1706.02677",
    "li2018": "1801.05134",
    "wu2018": "1803.08494",
    "kalamkar2019": "1905.12322",
    "wortsman2023stable": "2304.13013",
    "chowdhery2022": "2204.02311",
    "dixit2021": "2102.11245",
}


@pytest.mark.parametrize(("key", "part"), ADDRESS.items())
def test_short_keys_lead_to_their_paper(key, part):
    source = cite(key)
    assert part in source.url
    assert str(source.year) in key
    assert source.title in str(source)


def test_every_short_key_is_checked():
    assert {*ALIASES} | {source.key for source in FURTHER} == {*ADDRESS}


def test_every_work_of_the_catalog_resolves():
    for work in works():
        source = cite(work.id)
        assert (source.key, source.year, source.url) == (work.id, work.year, work.paper)
        assert source.title == {
            "S079": "Rethinking “Batch” in BatchNorm",
            "S095": "Orthogonal Recurrent Neural Networks with Scaled Cayley Transform",
        }.get(work.id, work.title)


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ('"Why" and"How "of it', "“Why” and “How” of it"),
        ('On ("quoted"), words', "On (“quoted”), words"),
        ('An inch: 1"', 'An inch: 1"'),
        ("The {N}yström {ReLU}", "The Nyström ReLU"),
    ],
)
def test_titles_are_written_for_reading(title, shown):
    assert readable(title) == shown


def test_no_work_is_listed_twice():
    pattern = re.compile(r"\d{4}\.\d{4,5}")
    surveyed = {match.group() for work in works() if (match := pattern.search(work.paper))}
    further = {match.group() for source in FURTHER if (match := pattern.search(source.url))}
    assert surveyed.isdisjoint(further)
    titles = {work.title.casefold() for work in works()}
    assert titles.isdisjoint(source.title.casefold() for source in FURTHER)
    keys = [source.key for source in FURTHER] + list(ALIASES)
    assert len({*keys}) == len(keys)


def test_text_leaves_out_an_absent_address():
    assert str(cite("glorot2010")).endswith("(2010), https://proceedings.mlr.press/v9/glorot10a.html")
    assert cite("S173").url == ""
    assert str(cite("S173")).endswith(f"({cite('S173').year})")


def test_unknown_key_offers_the_close_ones():
    with pytest.raises(ArgumentError, match=r"key='ioffe2016' is unknown; did you mean 'ioffe201[57]'"):
        cite("ioffe2016")
