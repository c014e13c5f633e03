"""Operations that read a text; whatever text it is, there is a result.

See `dsjax.data.tasks.operation` for the form of the tables.
"""

from __future__ import annotations

from dsjax.data.tasks.operation import operations

READERS = operations(r"""
read_integers: str -> ints
  - read all integers in the text, where a minus sign directly in front of a digit belongs to the number
  =
      import re
      $y = [int(found) for found in re.findall(r"-?[0-9]+", $x)]
  =
      $y = []
      at = 0
      while at < len($x):
          begin = at
          if $x[at] == "-":
              at += 1
          while at < len($x) and $x[at] in "0123456789":
              at += 1
          if $x[begin:at].strip("-"):
              $y.append(int($x[begin:at]))
          elif at == begin:
              at += 1

read_list: str -> ints with s in ',', ';', '|'
  - split the text at $s and read the parts that are integers (digits, perhaps with a minus sign in front and
    spaces around them), skipping the others
  =
      $y = []
      for part in $x.split($s):
          part = part.strip(" ")
          if part.removeprefix("-").isdecimal():
              $y.append(int(part))

read_pairs: str -> counts with s in ';', ',', ' '
  - split the text at $s into parts and read those of the form NAME=DIGITS as entries, later ones replacing
    earlier ones, skipping the other parts
  =
      $y = {}
      for part in $x.split($s):
          name, equals, number = part.partition("=")
          if equals and number.isdecimal():
              $y[name] = int(number)

expand_runs: str -> str
  - write out the runs: a digit says how often the character in front of it stands there in all, and characters
    without a digit stand once; a digit at the very front counts for nothing
  =
      $y = ""
      last = ""
      for char in $x:
          if char in "0123456789":
              $y = $y[: len($y) - len(last)] + last * int(char)
              last = ""
          else:
              $y += char
              last = char

sum_expression: str -> int
  - work out the text as integers joined by + and -, with spaces ignored (0 if it is anything else)
  =
      import re
      plain = $x.replace(" ", "")
      $y = 0
      if re.fullmatch(r"[0-9]+([+-][0-9]+)*", plain):
          for term in re.findall(r"[+-]?[0-9]+", plain):
              $y += int(term)

product_expression: str -> int
  - work out the text as integers joined by + and *, where * binds more tightly and spaces are ignored (0 if it
    is anything else)
  =
      import re
      plain = $x.replace(" ", "")
      $y = 0
      if re.fullmatch(r"[0-9]+([+*][0-9]+)*", plain):
          for term in plain.split("+"):
              product = 1
              for factor in term.split("*"):
                  product *= int(factor)
              $y += product

bracket_depth: str -> int
  - find how deeply the round brackets in it are nested, or -1 if they do not match, ignoring everything else
  =
      $y = 0
      depth = 0
      for char in $x:
          if char == "(":
              depth += 1
              $y = max($y, depth)
          elif char == ")":
              depth -= 1
              if depth < 0:
                  break
      if depth != 0:
          $y = -1

quoted: str -> words
  - list what stands in double quotes, one text for each pair of quotes, from left to right
  =
      $y = $x.split('"')[1::2]
      if $x.count('"') % 2:
          $y = $y[:-1]

strip_comments: str -> str
  - remove from every line what follows the first #, and the # itself
  =
      $y = "\n".join(line.split("#")[0] for line in $x.split("\n"))

indents: str -> ints
  - list for every line how many spaces it begins with
  =
      $y = [len(line) - len(line.lstrip(" ")) for line in $x.split("\n")]

clock_times: str -> ints
  - read every word of the form HOURS:MINUTES, with two digits of minutes, as a number of minutes, skipping
    other words
  =
      $y = []
      for word in $x.split():
          hours, colon, minutes = word.partition(":")
          if colon and hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2:
              $y.append(60 * int(hours) + int(minutes))

roman: str -> ints
  - read every word of the letters I, V and X as a Roman number, where a smaller letter in front of a larger one
    is subtracted, skipping other words
  =
      $y = []
      sizes = {"I": 1, "V": 5, "X": 10}
      for word in $x.split():
          if all(letter in sizes for letter in word):
              total = 0
              for letter, after in zip(word, word[1:] + " "):
                  size = sizes[letter]
                  total += -size if size < sizes.get(after, 0) else size
              $y.append(total)
""")
