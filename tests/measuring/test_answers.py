"""The answer behind a thought, and the letter that a reply to an exam question concludes with."""

import pytest

from medtune.measuring.answers import answer_of, written_letter


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("拨打120。", "拨打120。"),
        ("<think>\n先想想。\n</think>\n\n拨打120。", "拨打120。"),
        ("先想想。\n</think>\n\n拨打120。", "拨打120。"),
        ("<think>\n\n</think>\n\n拨打120。", "拨打120。"),
        ("<think>应拨打120", ""),
        ("<think>甲<think>乙</think>丙</think>丁", "丁"),
        ("<thinking>甲</thinking>乙<think>丙", "乙"),
        ("## Thinking\n\n甲\n\n## Final Response\n\n乙", "乙"),
    ],
)
def test_the_answer_is_what_stands_behind_the_thought(reply, answer):
    assert answer_of(reply) == answer


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("A和B都有可能，答案是B。", "B"),
        ("The answer is: B", "B"),
        ("（A）感冒", "A"),
        ("应该是痛风。", "B"),
        ("感冒或痛风", None),
        ("An apple", None),
        ("A common cold needs a rest", None),
        ("A is right", "A"),
        ("A. Common cold", "A"),
        ("", None),
    ],
)
def test_written_letter(reply, letter):
    assert written_letter(reply, {"A": "感冒", "B": "痛风"}) == letter


DRUGS = {"A": "阿司匹林", "B": "肝素", "C": "华法林", "D": "氯吡格雷"}
VITAMINS = {"A": "维生素A", "B": "维生素B1", "C": "维生素C", "D": "维生素D"}
GLANDS = {"A": "糖尿病", "B": "2型糖尿病", "C": "尿崩症", "D": "甲亢"}
ENGLISH = {"A": "Aspirin", "B": "Heparin", "C": "Warfarin", "D": "Clopidogrel"}
YES_NO = {"A": "yes", "B": "no", "C": "maybe"}
CONCLUSIONS = [
    ("A→错误，C→正确", DRUGS, "C"),
    ("B看似正确，其实C才是正确答案。", DRUGS, "C"),
    ("It can't be A or B. The answer must be C.", ENGLISH, "C"),
    ("Neither A nor C.", ENGLISH, None),
    ("可能是A，也可能是C", DRUGS, None),
    ("分析：A常见，B不典型。因此答案是 **C**。", DRUGS, "C"),
    ("A 错，B 错，D 不典型，\\boxed{C}", DRUGS, "C"),
    ("A、B可排除，正确选项为（C）。", DRUGS, "C"),
    ("不选A，选C。", DRUGS, "C"),
    ("答案：Ｃ", DRUGS, "C"),
    ("A is wrong, so the answer is **C**", DRUGS, "C"),
    ("选项A不正确，正确的是选项C。", DRUGS, "C"),
    ("Between B and C, C is better.", DRUGS, "C"),
    ("选C，而不是选A。", DRUGS, "C"),
    ("缺乏维生素A会夜盲，本例为佝偻病，答案应为D。", VITAMINS, "D"),
    ("最可能是2型糖尿病。", GLANDS, "B"),
    ("A和C都可以", DRUGS, None),
    ("None of A, B, C or D", DRUGS, None),
    ("C", DRUGS, "C"),
    ("C.", DRUGS, "C"),
    ("（C）", DRUGS, "C"),
    ("C. 华法林", DRUGS, "C"),
    ("C、华法林", DRUGS, "C"),
    ("C：华法林。A常见，B不典型。", DRUGS, "C"),
    ("C\n\n解释：A错误，B也不对。", DRUGS, "C"),
    ("**C**\n因为阿司匹林无效。", DRUGS, "C"),
    ("答案是A吗？不对，答案是C。", DRUGS, "C"),
    ("答案是A。更正：答案是C。", DRUGS, "C"),
    ("正确答案为C项。", DRUGS, "C"),
    ("本题应选C。", DRUGS, "C"),
    ("故选：C", DRUGS, "C"),
    ("故本题选择 C 项。", DRUGS, "C"),
    ("最终答案：\n\n$\\boxed{\\text{C}}$", DRUGS, "C"),
    ("【答案】C", DRUGS, "C"),
    ("C正确，A错误。", DRUGS, "C"),
    ("只有C是对的。", DRUGS, "C"),
    ("排除A、B、D，剩下C。", DRUGS, "C"),
    ("应选华法林。", DRUGS, "C"),
    ("答案是华法林，不是阿司匹林。", DRUGS, "C"),
    ("The answer is (C).", ENGLISH, "C"),
    ("Answer: c", ENGLISH, "C"),
    ("c", ENGLISH, "C"),
    ("(c) Warfarin", ENGLISH, "C"),
    ("The correct option is C.", ENGLISH, "C"),
    ("The best answer is C because A causes bleeding.", ENGLISH, "C"),
    ("I would choose C over B.", ENGLISH, "C"),
    ("C is the most likely answer.", ENGLISH, "C"),
    ("The answer is not A but C.", ENGLISH, "C"),
    ("It isn’t A. It is C.", ENGLISH, "C"),
    ("The answer is warfarin.", ENGLISH, "C"),
    ("Option C. Warfarin", ENGLISH, "C"),
    ("B is incorrect, D is unlikely, A can be excluded; this leaves C.", ENGLISH, "C"),
    ("Final answer: \\boxed{C}", ENGLISH, "C"),
    ("My pick is C) Warfarin", ENGLISH, "C"),
    ("The answer is yes.", YES_NO, "A"),
    ("Maybe.", YES_NO, "C"),
    ("选A或C", DRUGS, None),
    ("答案：A、C", DRUGS, None),
    ("答案是A，C", DRUGS, None),
    ("答案：AC", DRUGS, None),
    ("Both A and C are correct.", ENGLISH, None),
    ("It could be A or C.", ENGLISH, None),
    ("A. 阿司匹林\nB. 肝素\nC. 华法林\nD. 氯吡格雷", DRUGS, None),
    ("A. 阿司匹林 B. 肝素", DRUGS, None),
    ("题目没有正确答案。", DRUGS, None),
    ("A common drug is used.", ENGLISH, None),
    ("缺乏维生素C会出血", DRUGS, None),
    ("乙肝用C反应蛋白不能诊断", DRUGS, None),
    ("选项A和选项B都有道理", DRUGS, None),
    ("A、B、C、D均不对", DRUGS, None),
    ("答案不是A。", DRUGS, None),
    ("选A还是选C？", DRUGS, None),
    ("I don't know.", ENGLISH, None),
    ("Vitamin C deficiency", ENGLISH, None),
    ("不能确定", DRUGS, None),
    ("选A或者选C", DRUGS, None),
    ("答案是阿司匹林或华法林", DRUGS, None),
    ("C比A好", DRUGS, "C"),
    ("首先排除B。考虑到患者有房颤，华法林最合适，故选C", DRUGS, "C"),
    ("正确答案是C，因为A和B都只能短期使用。", DRUGS, "C"),
    ("答案：C（华法林）。阿司匹林（A）不适合。", DRUGS, "C"),
    ("根据题意，选择C：华法林", DRUGS, "C"),
    ("C选项正确", DRUGS, "C"),
    ("选项C：华法林 正确", DRUGS, "C"),
    ("A选项错误，C选项符合题意", DRUGS, "C"),
    ("因此，最佳选择是C。", DRUGS, "C"),
    ("The answer is C, since A and B are wrong.", ENGLISH, "C"),
    ("**Answer:** C\n\n**Explanation:** A is ...", ENGLISH, "C"),
    ("Therefore, C.", ENGLISH, "C"),
    ("答案为 C ，A 为干扰项。", DRUGS, "C"),
    ("选C。A、B、D都是抗血小板药。", DRUGS, "C"),
    ("答案选C,B是肝素的特点", DRUGS, "C"),
    ("此题答案为Ｃ．华法林", DRUGS, "C"),
    ("我认为是C", DRUGS, "C"),
    ("A不对；B不对；C对；D不对。", DRUGS, "C"),
    ("A: 错误\nB: 错误\nC: 正确\nD: 错误", DRUGS, "C"),
]


def test_the_letter_is_the_one_that_an_answer_concludes_with():
    read = [(reply, written_letter(reply, options), letter) for reply, options, letter in CONCLUSIONS]
    assert [(reply, got) for reply, got, letter in read if got != letter] == []
