"""Which language is a text in, as far as one can tell without a model: by its script, and among
languages of the Latin script by their commonest function words."""

import re
import unicodedata
from functools import lru_cache

SCRIPTS = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "hebrew": ("HEBREW",),
    "arabic": ("ARABIC",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "ko": ("HANGUL",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "zh": ("CJK",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
}
UNTOLD = 0.5  # of a text in the right script without any function word: a name, a number, a list
_WORD = re.compile(r"[^\W\d_]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = {
    "en": _words(
        "the of and to is that it for was on are as with be at by this have from or not but which"
        " you they were we their has had will would there been if he she his her my your in an"
    ),
    "de": _words(
        "der die das und ist nicht ein eine einen dem den des mit zu von auf für im es sich auch"
        " als an dass sie wir ich war wird sind bei oder aus nach wie über um noch nur kein er in"
    ),
    "fr": _words(
        "le la les des et est une un dans que qui pour pas sur au aux avec ce cette il elle nous"
        " vous ils sont par plus ne se du son sa ses mais ou été comme leur on je de en"
    ),
    "es": _words(
        "el la los las y es una un que no por con para del al se lo como más pero sus su está son"
        " fue ha este esta muy ya hay yo nos también porque cuando de en o"
    ),
    "it": _words(
        "il lo gli la le e è una un che non per con del della dei delle nel nella sono si come più"
        " ma anche questo questa ha da al alla dal io ci o di in"
    ),
    "pt": _words(
        "o a os as e é uma um que não por com para do da dos das no na nos nas se mais mas como foi"
        " seu sua ao são está isso este esta ele ela eu também de em ou"
    ),
    "nl": _words(
        "de het een en is van dat niet op te met voor zijn er aan om ook als bij maar dan naar door"
        " wordt zij wij ik je hij deze dit nog wel geen heeft of in"
    ),
}
LANGUAGES = (*SCRIPTS, *FUNCTION_WORDS)
_ANY = frozenset().union(*FUNCTION_WORDS.values())


def language_share(text: str, language: str) -> float:
    """How much of `text` is in `language` (one of LANGUAGES), in [0, 1].

    The share of its letters in the right script; for a language of FUNCTION_WORDS that times the
    share of its function words that are this language's, `UNTOLD` where there is none.
    """
    text = unicodedata.normalize("NFKC", text)  # full-width letters are letters
    if language in SCRIPTS:
        return _script_share(text, SCRIPTS[language])
    known = [word for word in _WORD.findall(text.lower()) if word in _ANY]
    own = sum(word in FUNCTION_WORDS[language] for word in known)
    return _script_share(text, SCRIPTS["latin"]) * (own / len(known) if known else UNTOLD)


def _script_share(text: str, scripts: tuple[str, ...]) -> float:
    letters = [character for character in text if character.isalpha()]
    inside = sum(_script(character) in scripts for character in letters)
    return inside / len(letters) if letters else 0.0


@lru_cache(maxsize=4_096)
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]
