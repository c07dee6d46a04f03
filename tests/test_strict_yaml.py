import pytest

from tealightning.errors import UserError
from tealightning.strict_yaml import load_yaml


def test_pair_of_escapes_is_one_character():
    text = load_yaml(r'{"system_prompt": "Be kind \ud83d\ude00", "name": 5}', "a.yaml")
    assert text == {"system_prompt": "Be kind 😀", "name": 5}


@pytest.mark.parametrize("document", [r'a: 1\nb: "x \ud83d"', r'a: 1\n"\ude00": x', r'a: 1\nb: ["\ude00\ud83d"]'])
def test_half_a_character_is_refused_with_its_line(document):
    with pytest.raises(UserError, match=r"a\.yaml, line 2: this is not YAML: a text holds half a character"):
        load_yaml(document.replace(r"1\n", "1\n"), "a.yaml")
