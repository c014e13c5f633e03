"""Operations on text and on lists of words. See `dsjax.data.tasks.operation` for the form of the tables."""

from __future__ import annotations

from dsjax.data.tasks.operation import operations

TEXTS = operations(r"""
reverse_text: str -> str
  - reverse the text
  - write the text backwards
  = $x[::-1]
  = "".join(reversed($x))

upper: str -> str
  - change all letters to upper case
  - write it in capital letters
  = $x.upper()

lower: str -> str
  - change all letters to lower case
  - write it in small letters
  = $x.lower()

swap_case: str -> str
  - swap upper and lower case
  = $x.swapcase()

drop_vowels: str -> str
  - remove the vowels (a, e, i, o, u, in either case)
  = "".join(c for c in $x if c not in "aeiouAEIOU")
  =
      $y = ""
      for char in $x:
          if char.lower() not in "aeiou":
              $y += char

keep_letters: str -> str
  - keep only the letters
  - remove everything but letters
  = "".join(c for c in $x if c.isalpha())

keep_digits: str -> str
  - keep only the digits
  - remove everything but digits
  = "".join(c for c in $x if c.isdigit())
  = "".join(filter(str.isdigit, $x))

drop_digits: str -> str
  - remove the digits
  = "".join(c for c in $x if not c.isdigit())

drop_spaces: str -> str
  - remove the spaces
  = $x.replace(" ", "")
  = "".join($x.split(" "))

double_letters: str -> str
  - write every character twice
  - double every character
  = "".join(c + c for c in $x)
  =
      $y = ""
      for char in $x:
          $y += char * 2

every_second_char: str -> str
  - keep every second character, starting with the first
  = $x[::2]

replace: str -> str with a in 'a', 'e', 'o', ' ', 'l'; b in '_', 'x', '-', 'ee'
  - replace every $a by $b
  - put $b wherever $a stands
  = $x.replace($a, $b)

drop_char: str -> str with c in 'a', 'e', 't', 's', 'n'
  - remove every $c
  = $x.replace($c, "")
  = "".join(v for v in $x if v != $c)

drop_first_chars: str -> str with n in 2, 3
  - drop the first $n characters
  - remove $n characters at the front
  = $x[$n:]

take_first_chars: str -> str with n in 3, 5, 8
  - keep only the first $n characters
  - cut the text off after $n characters
  = $x[:$n]

take_last_chars: str -> str with n in 3, 4, 6
  - keep only the last $n characters
  = $x[-$n:]

sort_chars: str -> str
  - sort the characters by their code points
  = "".join(sorted($x))

unique_chars: str -> str
  - keep only the first occurrence of each character
  = "".join(dict.fromkeys($x))
  =
      $y = ""
      for char in $x:
          if char not in $y:
              $y += char

shift: str -> str with k in 1, 3, 13
  - move every letter from a to z by $k places in the alphabet, from z on to a; leave everything else as it is
  =
      $y = ""
      for char in $x:
          if "a" <= char <= "z":
              char = chr((ord(char) - ord("a") + $k) % 26 + ord("a"))
          $y += char

squeeze: str -> str
  - replace runs of one character by a single one
  =
      $y = ""
      for char in $x:
          if not $y.endswith(char):
              $y += char
  = "".join(c for i, c in enumerate($x) if i == 0 or c != $x[i - 1])

palindrome: str -> str
  - append its reverse to it
  = $x + $x[::-1]

swap_ends: str -> str
  - swap the first and the last character
  = $x[-1] + $x[1:-1] + $x[0] if len($x) > 1 else $x
""")

TEXT_TOTALS = operations(r"""
length: str -> int
  - count the characters
  = len($x)

count_vowels: str -> int
  - count the vowels (a, e, i, o, u, in either case)
  = sum(c in "aeiouAEIOU" for c in $x)

count_upper: str -> int
  - count the letters in upper case
  = sum(c.isupper() for c in $x)

count_char: str -> int with c in 'a', 'e', 'l', ' '
  - count how often $c occurs
  = $x.count($c)

count_chars: str -> int
  - count the different characters
  = len(set($x))

text_digit_sum: str -> int
  - add up the digits in it (0 if there are none)
  = sum(int(c) for c in $x if c.isdigit())

longest_run: str -> int
  - find the length of the longest run of one character (0 for an empty text)
  =
      $y = 0
      length = 0
      for i, char in enumerate($x):
          length = length + 1 if i and char == $x[i - 1] else 1
          $y = max($y, length)
""")

SPLITS = operations(r"""
split: str -> words
  - split the text into words at white space
  = $x.split()

split_commas: str -> words
  - split the text at commas
  = $x.split(",")

pieces: str -> words with n in 2, 3, 4
  - cut the text into pieces of $n characters, the last one may be shorter
  = [$x[i : i + $n] for i in range(0, len($x), $n)]

letter_counts: str -> counts
  - count how often each character occurs
  = {c: $x.count(c) for c in $x}
  =
      $y = {}
      for char in $x:
          $y[char] = $y.get(char, 0) + 1
""")

WORDS = operations(r"""
sort_words: words -> words
  - sort the words
  - put the words in order by their code points
  = sorted($x)

sort_by_length: words -> words
  - sort the words by length, shorter ones first, words of equal length as they were
  = sorted($x, key=len)

reverse_words: words -> words
  - put the words in reverse order
  = $x[::-1]
  = list(reversed($x))

longer_words: words -> words with n in 1, 2, 3, 4
  - keep only the words of more than $n characters
  = [w for w in $x if len(w) > $n]

shorter_words: words -> words with n in 2, 3, 4, 5
  - keep only the words of at most $n characters
  = [w for w in $x if len(w) <= $n]

upper_words: words -> words
  - write every word in capital letters
  = [w.upper() for w in $x]

reverse_each: words -> words
  - reverse every word
  = [w[::-1] for w in $x]

unique_words: words -> words
  - keep only the first occurrence of each word
  = list(dict.fromkeys($x))

first_words: words -> words with n in 2, 3
  - keep only the first $n words
  = $x[:$n]

skip_word: words -> words
  - drop the first word
  = $x[1:]

words_without: words -> words with c in 'a', 'e', 'o', 'i'
  - remove the words that hold $c
  = [w for w in $x if $c not in w]

words_with: words -> words with c in 'a', 'e', 'o', 'r'
  - keep only the words that hold $c
  = [w for w in $x if $c in w]

initials: words -> words
  - cut every word down to its first character
  = [w[:1] for w in $x]
""")

WORD_RESULTS = operations(r"""
join: words -> str with s in ' ', '-', '', ', '
  - join the words with $s between them
  = $s.join($x)

longest_word: words -> str
  - take the longest word, the first of them if there are several (an empty text if there is none)
  = max($x, key=len, default="")

word_lengths: words -> ints
  - replace every word by its length
  = [len(w) for w in $x]
  = list(map(len, $x))

count_words: words -> int
  - count the words
  = len($x)

total_length: words -> int
  - add up the lengths of the words
  = sum(len(w) for w in $x)
  = len("".join($x))

word_counts: words -> counts
  - count how often each word occurs
  = {w: $x.count(w) for w in $x}
  =
      $y = {}
      for word in $x:
          $y[word] = $y.get(word, 0) + 1
""")
