"""What cleaning changes in a text, what it leaves, and which personal data are masked."""

import pytest
from reading_cases import assistant, system, tool, user

from medtune.errors import Unusable
from medtune.reading.cleaning import Cleaner
from medtune.reading.personal_data import mask_personal_data
from medtune.reading.records import Dialogue, Document, Pair

# ---------------------------------------------------------------- cleaning


def clean(text: str) -> str:
    return Cleaner(mask=False)(Document(text, "")).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("感\x00冒\x07\u200b了\ufeff\u00ad", "感冒了"),
        ("一\r\n二\r三\u2028四\x0c五", "一\n二\n三\n四\n五"),
        ("\u202e反\u202c 表\t格", "反 表\t格"),
        ("医\u200d生", "医\u200d生"),  # a joiner, as emoji have
        ("cafe\u0301 \u1100\u1161", "café 가"),
        ("ＡＢＣ，５０％", "ＡＢＣ，５０％"),  # NFC, not NFKC
    ],
)
def test_characters(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("怎么办？？？？谢谢！！", "怎么办？谢谢！"),
        ("好的。。。先，，休息、、吧", "好的。先，休息、吧"),
        ("help!!!! why???", "help! why?"),
        ("a!! b?? std::vector; i++", "a!! b?? std::vector; i++"),
        ("等等...... 是的……………… 对————", "等等... 是的…… 对——"),
        ("wait... 嗯…… ——", "wait... 嗯…… ——"),
        ("姓名____ **重点** --- ====", "姓名____ **重点** --- ===="),
        ("~~~~", "~"),
    ],
)
def test_repeated_punctuation(text, expected):
    assert clean(text) == expected


def test_idle_blanks():
    assert clean("发热   咳嗽 \n\n\n\n 1. 休息\n    - 多喝水  \n\u3000\u3000二") == (
        "发热 咳嗽\n\n 1. 休息\n    - 多喝水\n\u3000\u3000二"
    )


def test_long_runs_of_blanks_take_no_long_time():
    assert clean(f"a{' ' * 300_000}b\n{' ' * 300_000}c <b{' ' * 300_000}c") == f"a b\n{' ' * 300_000}c <b c"


def test_code_and_pages_stay():
    code = "看：\n```html\n<p>a</p>   !!!!\n\n\n\n```\n完了！！"
    assert clean(code) == "看：\n```html\n<p>a</p>   !!!!\n\n\n\n```\n完了！"
    page = "<!DOCTYPE html><html><p>a</p></html>"
    cleaned = Cleaner(mask=False)(Dialogue([user(page)], None, ""))
    assert cleaned.messages[0]["content"] == page
    assert clean(page) == "a"


def test_tool_results_are_not_cleaned_but_masked():
    calls = [{"name": "find", "arguments": {"phone": 13812345678, "tags": ["<b>", True]}}]
    messages = [user("<b>查</b>"), assistant("", tool_calls=calls), tool("<b>13812345678</b>"), assistant("好")]
    cleaner = Cleaner(mask=True)
    cleaned = cleaner(Dialogue(messages, None, "")).messages
    assert cleaned[0]["content"] == "查"
    assert cleaned[1]["tool_calls"] == [
        {"name": "find", "arguments": {"phone": "[mobile number]", "tags": ["<b>", True]}}
    ]
    assert cleaned[2]["content"] == "<b>[mobile number]</b>"
    assert messages[1]["tool_calls"] == calls  # the record given is as it was
    assert cleaner.masked == {"mobile numbers": 2}


def test_what_cleaning_leaves_empty_or_equal_is_no_record():
    cleaner = Cleaner(mask=False)
    with pytest.raises(Unusable) as fault:
        cleaner(Dialogue([user("a"), assistant("<br>")], None, ""))
    assert (fault.value.reason, fault.value.detail) == ("empty after cleaning", "turn 2 (assistant) was '<br>'")
    with pytest.raises(Unusable) as fault:
        cleaner(Pair([user("a")], "好。", "好。。", None, ""))
    assert fault.value.reason == "same replies after cleaning"
    cleaned = cleaner(Dialogue([system("&nbsp;"), user("a")], None, ""))
    assert cleaned.messages == [user("a")]


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电话13812345678。", "电话[手机号]。"),
        ("微信同号：138-1234-5678或+86 138 1234 5678", "微信同号：[手机号]或[手机号]"),
        ("我的号码１３８１２３４５６７８", "我的号码[手机号]"),
        ("call 13812345678", "call [mobile number]"),
        ("身份证110101199003074514，尾号11010119900307451x", "身份证[身份证号]，尾号[身份证号]"),
        ("写信到 a.b-c+d@mail.example.com，谢谢", "写信到 [邮箱]，谢谢"),
        ("mail me@x.org.", "mail [e-mail]."),
    ],
)
def test_personal_data_is_masked(text, expected):
    assert mask_personal_data(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "血小板12345678901个",  # no mobile number starts with 12
        "订单号9913812345678001",
        "编号110101199013074514",  # month 13
        "2024-01-15 13:00，10.5@8",
        "概率为0.13812345678",
        "@患者 你好",
        "服用 0.5 mg，每日3次，共138天",
    ],
)
def test_other_numbers_are_not_masked(text):
    assert mask_personal_data(text) == (text, [])
