"""The words that choose, favour or rule out an option, before and behind its mark (option_marks), Chinese and English.

Patterns that end in `$` are for the text before a mark. NFKC has made all marks of the text half-width.
"""

import re

from medtune.measuring.option_marks import MARK


def _any_of(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns), re.IGNORECASE)


SENTENCE_END = re.compile(r"[。!?;\n]|\.(?=\s|\.|$)")
CLAUSE_END = re.compile(r",|—|--")

# ---------------------------------------------------------------- forms

FINAL_FORM = re.compile(
    r"<answer>(.*?)</answer>|\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
    r"|\"[^\"\n]*(?:answer|choice|答案|选项)[^\"\n]*\"\s*:\s*\"([^\"\n]{1,60})\"",  # a key of JSON
    re.DOTALL | re.IGNORECASE,
)
# Where a base model goes on to a question of its own.
NEXT_QUESTION = re.compile(
    r"\n *(?:(?:question|q|题目|问题|问|human|user|用户) *\d* *[:：]|第 *\d+ *题"
    r"|\d+ *[.、．].*\n\s*[AaＡ] *[.、．)）])",
    re.IGNORECASE,
)
ONE_MARK = MARK.replace("+", "")
# What may lead to an option that stands alone.
_LINKS = (
    r"(?:所以|因此|故|因而|综上所述|综上|总之|那么?就?|是|应?选|答案?|[\s,:.。(\[\"'“>-]"
    r"|\b(?:so|thus|therefore|hence|then|yes|no|it is|it's|definitely|clearly|answer|option)\b)*"
)
LED_TO = _any_of(_LINKS)
ALONE_LINE = _any_of(rf"(?:^|\n){_LINKS}{ONE_MARK}[ .。!,:)]*(?=\n|$)")
ALONE = _any_of(
    rf"\A{_LINKS}{ONE_MARK}(?=\s*(?:[.。,;:!(—-]|\n|$))",
    rf"\?\s*{_LINKS}{ONE_MARK}(?=\s*[.。,;!]|\s*$)",
)
# The dot of a label ends no sentence.
LABEL_AND_DOT = re.compile(rf"((?:^|\n)[ \d.•(-]*{ONE_MARK}) *[.)、] *(?=[^\s.])")
LABEL = _any_of(
    rf"(?:^|\n)[\s\d.•-]*{ONE_MARK}", rf"(?<=[;。.,:\s])\s*{ONE_MARK}(?=\s*[:.、)-])|(?<=[;。])\s*{ONE_MARK}(?=,)"
)
_VERDICT = r"(?:错|不|排除|对|正确|\b(?:wrong|incorrect|false|ruled out|excluded|correct|right|true)\b)"
# What is said of all the others chooses the option.
EXCEPT = _any_of(
    rf"(?:除了?|\b(?:except(?: for)?|other than|besides|apart from)) ?{MARK}[^⟦⟧。.;\n]{{0,24}}?{_VERDICT}",
    rf"\b(?:all|each|every\w*|nothing)\b[^⟦⟧.]{{0,60}}\b(?:except(?: for)?|but) {MARK}"
    rf"(?:[^⟦⟧。.;\n]{{0,24}}?{_VERDICT})?",
    rf"{_VERDICT},? (?:except|but)(?: for)? {MARK}",
    rf"{MARK}(?:以外|之外)[^⟦⟧。.;\n]{{0,16}}?{_VERDICT}",
    rf"非 ?{MARK} ?莫属",
    rf"\b(?:exception|odd one out)(?: is|:)? (?:option )?{MARK}",
)
EITHER = re.compile(rf"不是{MARK},?[就便]是{MARK}")
WHY = _any_of(r"为(?:什么|何|啥)[^不]*$", r"\bwhy\b(?!.*not\b)")
ASKED_BEHIND = re.compile(r"[^,]{0,12}[吗呢](?=\W|$)")
# "A? No. C? Yes." The groups say what the answer makes of the option in the question.
ANSWER = _any_of(
    r"[\s?,(\"'—-]*(?:(?:well|h+m+|i think|i'd say|clearly|definitely|absolutely|of course|certainly|probably"
    r"|嗯|我觉得|我想|应该|显然|当然|肯定)[\s,]*)*"
    r"(?:(?P<wrong>no(?:pe)?|not (?:really|quite|at all|likely)|wrong|incorrect|false|unlikely"
    r"|不(?:是|对|行|正确|符合?|可能|太?像)?|否|错误?|有误)"
    r"|(?P<right>yes|yep|yeah|(?:that's |that is )?(?:correct|right(?!,)|true)|exactly|是|对|正确|没错|符合))"
    r"[的了啊呀哦吧]*(?=\s*(?:[.,。;!:)(—-]|\n|$)|\s⟦)"
)
# 是不是 and 对不对 negate nothing.
NEGATED_QUESTION = _any_of(r"^不|(.)不(?!\1)|并?非|错|排除|\b(?:not|wrong|incorrect|excluded)\b|n't\b")

# ---------------------------------------------------------------- before an option

# May stand between what chooses an option and the option. Of a repeated group no two alternatives may match the same
# text in two ways: a reply that repeats itself would be read in exponential time.
_FILL_WORD = (
    r"[\s:=\"'“”「」()\[\]【】→>—应该当就只可能最是为选项择定的即了有使用给予进行做查-]"
    r"|\b(?:is|was|be|now|still|should|would|will|must|could|may|have to|has to|to|therefore|thus|then|indeed|the|my"
    r"|for|definitely|clearly|probably|likely|most|best|with|option|choice|one|answer|here|letter|drug|diagnosis)\b"
)
FILL = rf"(?:{_FILL_WORD}|,\s*(?:therefore|thus|indeed|then|当然|显然),?)*"
FILL_OF_SENTENCES = _any_of(f"(?:{_FILL_WORD}|[.,])*")
RULED_OUT_BEFORE = re.compile(
    r"(?:(?<![么能得])不|(?<![分特级区个辨识])别|勿|并?非|排除了?|除了?|剔除|优于|好于|胜过|强于|而不|误(?:选(?!项)|以为|认为)"
    r"|区别于|不同于|相?比|较|(?<!-)>|其次|再次|次选|避免|禁用|忌用|慎用|无需|无须"
    r"|\b(?:not|neither|nor|never|than|exclud(?:e|es|ed|ing)|eliminat(?:e|es|ed|ing)|rul(?:e|es|ed|ing) out|instead of"
    r"|no need|over|unlike|except(?: for)?|against|versus|vs|compared (?:to|with)|superior to|opposed to"
    r"|beats|outperforms|(?:don't|do not) (?:think|believe))\b|n't)"
    r"(?:[\s:(\[\"'“应该会能宜可要用选择使给予像是为项]|建议|推荐|考虑|支持"
    r"|\b(?:be|it|it's|is|to|that|the|answer|option|choose|pick|select|either)\b)*$",
    re.IGNORECASE,
)
# Around an option that another is compared with or takes the place of.
COMPARED_BEFORE = _any_of(r"(?:与|和|跟|同|相对于|由|从|把|将)$", r"\bfrom $")
COMPARED_BEHIND = re.compile(r"相比|比较|比| ?[改换更修]| to ")
SURPASSED_BEFORE = _any_of(
    r"(?:不如|不及|劣于|次于|逊于|比不上)(?:选择?)?$", r"\b(?:less|worse|inferior)\b[^⟦⟧.,;]{0,30}\b(?:than|to)\s*$"
)
CHOSEN_BEFORE = re.compile(
    r"(?:答案[^⟦⟧。.,;\n不]{0,24}?(?:应|是|为|选|:|=|—|→|】|\)|\]|就|确定)|答案?|(?<!不)(?:选择?|选定|选取)"
    r"|的(?:选项|答案|选择|一项|项|说法|药物|诊断|措施|检查|治疗|处理)?(?:应该?|应当)?(?:是|为|:)"
    r"|(?:正确|最佳)(?:选项|答案|选择|项)|错误(?:选项|项)|\b(?:answer|ans|final|correct|right)\b\.?"
    r"|\b(?:answer|option|choice)\b[^⟦⟧.;\n]{0,60}\b(?:is|be|:)"
    r"|\b(?:choos(?:e|ing)|chose|select(?:ed|ing)?|pick(?:ed|ing)?|opt for|go(?:ing)? (?:for|with)|went with"
    rf"|settle (?:on|for)|vote(?: for)?)){FILL}$",
    re.IGNORECASE,
)
FAVOURED_BEFORE = re.compile(
    r"(?:是|为|即|宜|像|用|考虑|诊断|倾向于?|偏向于?|支持|剩下?|只有|唯有|唯独|指向|提示|符合|推荐|建议|首[选先]|优先|以|属于?|选用|改[为成]|确定"
    r"|应(?:该|当|做|行|给予|予|用|选用|补充)?"
    r"|\b(?:(?:it|this|that|which|here)(?:'s| is| must be| should be| would be| has to be)|leav(?:es?|ing)(?: us)?"
    r"|remains?|only|lean(?:ing|ed)? towards?|inclined to|points? to|suggests?|indicates?|means?|favou?rs?"
    r"|consistent with|typical of|case of|corresponds? to|matches|(?:thus|therefore|so|hence|but),?|say|think|believe"
    r"|prefer|give|use|receive|start with|needs?|recommend|meant|definitely|clearly|probably"
    r"|(?:most|best|likely|appropriate|effective|suitable|preferred|first|diagnosis|cause|step|treatment)\b"
    rf"[^⟦⟧.;,\n]{{0,60}}\b(?:is|be|:|are|with|of))){FILL}$",
    re.IGNORECASE,
)
PREFERRED_BEFORE = _any_of(r"最|更|首选?先?|优先|唯|只有|只剩", r"\b(?:most|best|only|prefer\w*|first choice)\b")
TENTATIVE_BEFORE = _any_of(
    r"(?:有|多|数|少|些|别)人|有的|有些|一些|鉴别|同学|学生|考生|容易[误错混选想认]|易[误错混]|误[选以认]|常被|初看|乍[看一]|表面上",
    r"看似|看上去|看起来|貌似|一开始|起初|最初|初步|原(?:本|来|先|答案|以为|选)|(?<![首优])先[选看考]|首先看|之前|以为",
    r"\b(?:some|many|people|students?|others|you|one) (?:might|may|would|could|will|often)",
    r"\bseems?|\bappears?|\b(?:before|then|followed by)\b|然后|随后|必要时|再[做行查用]|\bwas\b|used to",
    r"tempt|at first|initial(?:ly)?|first (?:thought|answer|guess|choice was)",
)
DISCUSSED_BEFORE = _any_of(
    r"(?:看|分析|讨论|评估)(?:一下|看)?$", r"\b(?:look(?:ing)? at|consider|examine|evaluate|starting with)\s*$"
)
CONDITION = _any_of(r"如果|若(?!干)|假如|假设|倘若|要是|取决于", r"\b(?:if|unless|depends? on)\b")
CONCLUSION = _any_of(r"但|所以|因此|故|本例|本题|本患者|该患者", r"\b(?:but|so|therefore|thus|hence|here)\b")
FORCED = _any_of(r"只能|必须|一定要|非要|硬要", r"\b(?:had to|have to|must|forced|only)\b")
CORRECTION = _any_of(
    r"(?:^|[\s。,.;!?—(-])(?:哦?不(?:是|对)?|错了?|等等|等一下|稍等|更正|修正|纠正|看错|说错|抱歉|对不起|重新|再想|准确地?说"
    r"|no|wait|actually|correction|corrected|sorry|i mean|i meant|rather|on (?:second thought|reflection)"
    r"|scratch that|oops|edit|update|revised)(?![a-z])",
    r"改[为成选]|修正为|更正为",
)
CONTRAST = _any_of(r"但|却|然而|不过|可是|反而|其实|实际", r"\b(?:but|however|yet|though|although|actually|in fact)\b")
ALSO_BEFORE, ALSO_BEHIND = (
    _any_of(r"\s*(?:也|亦|同样|又|或|而且|\b(?:also|or|(?:and|but) so)\b)"),
    re.compile("也[可行是能没对]"),
)

# ---------------------------------------------------------------- behind an option

SURPASSES_BEHIND = re.compile(
    r"\s*(?:>|beats\b|outperforms\b)|(?:明显|显然|要|总体)?(?:比|优于|好于|胜过|强于)(?![较如])"
)
TENTATIVE_BEHIND = _any_of(
    r"[^.,。]{0,6}(?:看似|看起来|看上去|似乎|貌似|乍看|初看|迷惑|干扰)",
    r"\s*(?:only )?(?:if|unless)\b",
    r"[^.,]{0,20}\b(?:tempting|at first|seems?|appears?|looks?|distractor)\b",
)
# What follows is said of others, or gives a reason.
OTHERS = _any_of(
    r"\A\s*,\s*not\b|,?而(?:不是|非)|其他|其它|其余|另外|因|由于",
    r"\b(?:others?|the rest|remaining|because|since|as)\b",
)
# Named like standings: wrong, preferred, right.
VERDICT = _any_of(
    r"(?P<wrong>(?<!没)(?<!没有)错误?|有误|不是|并?非|欠妥|无关|危险|有害|禁忌|禁用|可?以?(?:被|先)?(?:排除|剔除)|劣于|次于|逊于|次之|×|\u2717|\u2718|\u274c|差(?!异|不多)"
    r"|不[太是够很甚怎么完全大能可应宜该]*(?:对(?![称等])|正确|准确|符合?|合适|适合|适宜|适用|恰当|妥|当|行|可取|成立|首选|考虑|优先"
    r"|属于?|典型|支持|选|用|满足|吻合|最|理想|如|及)|(?<=[:-] )(?:no|F|N|否)\b|no longer\b"
    r"|\b(?:wrong|incorrect|not|cannot|unlikely|false|excluded|eliminated|ruled out|less|inappropriate|unsuitable"
    r"|dangerous|harmful|unsafe|contraindicated|irrelevant|inferior|worse|ineffective|fails?)\b|n't\b)",
    r"(?P<preferred>最|(?<!刚)才|更[加为]?|首选|为宜|当选|唯一|为优|较(?:好|优|合适|适合|佳|妥)"
    r"|\b(?:best|better|safer|faster|closer|fastest|safest|most|more|superior|preferred|preferable|favou?red|recommended|ideal"
    r"|the (?:answer|one)|only|remains?|first-line)\b)",
    r"(?P<right>正确|对(?![于比照应称症话抗])|合适|适合|适宜|恰当|准确|√|\u2713|\u2714|\u2705|无误|没有?错|成立|符合|满足|是答案|吻合|可取|妥当"
    r"|可选|均可|可以|(?<=[:-] )(?:yes|T|Y|是)\b"
    r"|\b(?:correct|right|true|likely|appropriate|suitable|fits?|matches|valid|accurate|it is)\b)",
)
