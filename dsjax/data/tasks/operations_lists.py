"""Operations on lists of integers and on integers. See `dsjax.data.tasks.operation` for the form of the tables."""

from __future__ import annotations

from dsjax.data.tasks.operation import operations

LISTS = operations(r"""
reverse: ints -> ints
  - reverse the list
  - turn the list around
  - put the numbers in reverse order
  = $x[::-1]
  = list(reversed($x))
  =
      $y = []
      for value in $x:
          $y.insert(0, value)

sort_up: ints -> ints
  - sort the numbers in ascending order
  - sort the list from smallest to largest
  - put the numbers in increasing order
  = sorted($x)
  =
      $y = list($x)
      $y.sort()

sort_down: ints -> ints
  - sort the numbers in descending order
  - sort the list from largest to smallest
  - put the numbers in decreasing order
  = sorted($x, reverse=True)
  = sorted($x)[::-1]

keep_even: ints -> ints
  - keep only the even numbers
  - remove the odd numbers
  - drop every odd number
  = [v for v in $x if v % 2 == 0]
  =
      $y = []
      for value in $x:
          if value % 2 == 0:
              $y.append(value)

keep_odd: ints -> ints
  - keep only the odd numbers
  - remove the even numbers
  - drop every even number
  = [v for v in $x if v % 2 != 0]
  =
      $y = []
      for value in $x:
          if value % 2 == 1:
              $y.append(value)

keep_multiples: ints -> ints with k in 3, 4, 5, 6, 7
  - keep only the multiples of $k
  - remove every number that is not divisible by $k
  = [v for v in $x if v % $k == 0]
  =
      $y = []
      for value in $x:
          if value % $k == 0:
              $y.append(value)

drop_multiples: ints -> ints with k in 3, 4, 5, 6, 7
  - remove the multiples of $k
  - keep only the numbers that are not divisible by $k
  = [v for v in $x if v % $k]
  = [v for v in $x if v % $k != 0]

keep_above: ints -> ints with k in -3, 0, 2, 4, 5, 10
  - keep only the numbers greater than $k
  - remove every number that is $k or less
  = [v for v in $x if v > $k]
  =
      $y = []
      for value in $x:
          if value > $k:
              $y.append(value)

keep_below: ints -> ints with k in -2, 0, 3, 5, 8, 12
  - keep only the numbers less than $k
  - remove every number that is $k or more
  = [v for v in $x if v < $k]
  = list(filter(lambda v: v < $k, $x))

add: ints -> ints with k in 1, 2, 3, 5, 10
  - add $k to every number
  - increase each number by $k
  = [v + $k for v in $x]
  = list(map(lambda v: v + $k, $x))
  =
      $y = []
      for value in $x:
          $y.append(value + $k)

subtract: ints -> ints with k in 1, 2, 3, 4, 7
  - subtract $k from every number
  - decrease each number by $k
  = [v - $k for v in $x]

multiply: ints -> ints with k in 2, 3, 4, 5, 10
  - multiply every number by $k
  - replace each number by $k times itself
  = [v * $k for v in $x]
  =
      $y = []
      for value in $x:
          $y.append(value * $k)

square: ints -> ints
  - square every number
  - replace each number by its square
  = [v * v for v in $x]
  = [v ** 2 for v in $x]

absolute: ints -> ints
  - replace every number by its absolute value
  - drop the sign of every number
  = [abs(v) for v in $x]
  = list(map(abs, $x))

negate: ints -> ints
  - change the sign of every number
  - negate each number
  = [-v for v in $x]

remainder: ints -> ints with k in 2, 3, 5, 7, 10
  - replace every number by its remainder after division by $k, which is never negative
  - take every number modulo $k, with a result from 0 to below $k
  = [v % $k for v in $x]

halve: ints -> ints
  - replace every number by its half, rounded down
  - divide every number by 2, rounding down
  = [v // 2 for v in $x]

unique: ints -> ints
  - remove repeated numbers, keeping the first of each
  - keep only the first occurrence of each number
  = list(dict.fromkeys($x))
  =
      $y = []
      for value in $x:
          if value not in $y:
              $y.append(value)

tail: ints -> ints
  - drop the first number
  - remove the number at the front
  = $x[1:]

front: ints -> ints
  - drop the last number
  - remove the number at the end
  = $x[:-1]

drop_first: ints -> ints with n in 2, 3
  - drop the first $n numbers
  - remove $n numbers at the front
  = $x[$n:]

drop_last: ints -> ints with n in 2, 3
  - drop the last $n numbers
  - remove $n numbers at the end
  = $x[:-$n]

take_first: ints -> ints with n in 2, 3, 4, 5
  - keep only the first $n numbers
  - cut the list off after $n numbers
  = $x[:$n]

take_last: ints -> ints with n in 2, 3, 4, 5
  - keep only the last $n numbers
  = $x[-$n:]

every_second: ints -> ints
  - keep every second number, starting with the first
  - drop the second number, the fourth, and so on
  = $x[::2]
  = [v for i, v in enumerate($x) if i % 2 == 0]

every_third: ints -> ints
  - keep every third number, starting with the first
  = $x[::3]

rotate: ints -> ints with n in 2, 3
  - move the first $n numbers to the end, in the same order
  - put the first $n numbers behind the others
  = $x[$n:] + $x[:$n]

running_sum: ints -> ints
  - replace every number by the sum of all numbers up to and including it
  - take the running total of the list
  = [sum($x[: i + 1]) for i in range(len($x))]
  =
      $y = []
      total = 0
      for value in $x:
          total += value
          $y.append(total)

running_maximum: ints -> ints
  - replace every number by the largest number up to and including it
  - take the running maximum of the list
  = [max($x[: i + 1]) for i in range(len($x))]
  =
      $y = []
      for value in $x:
          $y.append(value if not $y else max($y[-1], value))

differences: ints -> ints
  - replace the list by the differences of neighbours, each number minus the one before it
  - subtract from every number but the first the one before it, and drop the first
  = [b - a for a, b in zip($x, $x[1:])]
  = [$x[i] - $x[i - 1] for i in range(1, len($x))]

neighbour_sums: ints -> ints
  - replace the list by the sums of neighbours, each number plus the one before it
  = [a + b for a, b in zip($x, $x[1:])]

clip: ints -> ints with a in -5, 0, 1; b in 6, 9
  - limit every number to the range from $a to $b
  - raise numbers below $a to $a and lower numbers above $b to $b
  = [min(max(v, $a), $b) for v in $x]

mirror: ints -> ints
  - append the reverse of the list to it
  - follow the list by its own reverse
  = $x + $x[::-1]

weigh: ints -> ints
  - multiply every number by its position, counting from 1
  - multiply the first number by 1, the second by 2, and so on
  = [i * v for i, v in enumerate($x, 1)]

keep_repeated: ints -> ints
  - keep only the numbers that occur more than once, with all their occurrences
  = [v for v in $x if $x.count(v) > 1]

drop_smallest: ints -> ints
  - remove every occurrence of the smallest number
  = [v for v in $x if v != min($x)]
  =
      least = min($x, default=0)
      $y = [value for value in $x if value != least]
""")

TOTALS = operations(r"""
sum: ints -> int
  - add up the numbers (0 if there are none)
  - take the sum of the numbers, 0 for an empty list
  = sum($x)
  =
      $y = 0
      for value in $x:
          $y += value

maximum: ints -> int
  - take the largest number (0 if there are none)
  = max($x, default=0)
  = max($x) if $x else 0

minimum: ints -> int
  - take the smallest number (0 if there are none)
  = min($x, default=0)
  = min($x) if $x else 0

count: ints -> int
  - count the numbers
  - count how many numbers there are
  = len($x)

count_distinct: ints -> int
  - count the different numbers
  - count how many different numbers there are
  = len(set($x))

first: ints -> int
  - take the first number (0 if there is none)
  = $x[0] if $x else 0

last: ints -> int
  - take the last number (0 if there is none)
  = $x[-1] if $x else 0

spread: ints -> int
  - take the largest number minus the smallest (0 if there are none)
  = max($x, default=0) - min($x, default=0)

alternating_sum: ints -> int
  - add and subtract the numbers in turn, the first one added (0 if there are none)
  - take the first number minus the second plus the third and so on (0 if there are none)
  = sum($x[::2]) - sum($x[1::2])
  = sum(v if i % 2 == 0 else -v for i, v in enumerate($x))

most_frequent: ints -> int
  - take the most frequent number, the smallest of them if there are several (0 if there are none)
  = min($x, key=lambda v: (-$x.count(v), v), default=0)
  =
      $y = 0
      most = 0
      for value in sorted(set($x)):
          if $x.count(value) > most:
              $y = value
              most = $x.count(value)

lower_median: ints -> int
  - take the number in the middle of the sorted list, the lower one of two (0 if there are none)
  = sorted($x)[(len($x) - 1) // 2] if $x else 0

second_largest: ints -> int
  - take the second largest of the different numbers (0 if there are fewer than two)
  =
      distinct = sorted(set($x))
      $y = distinct[-2] if len(distinct) > 1 else 0
""")

NUMBERS = operations(r"""
plus: int -> int with k in 1, 3, 4, 7, 12
  - add $k
  - increase it by $k
  = $x + $k

minus: int -> int with k in 1, 2, 5, 9
  - subtract $k
  - decrease it by $k
  = $x - $k

times: int -> int with k in 2, 3, 5, 7
  - multiply it by $k
  = $x * $k

modulo: int -> int with k in 7, 9, 11, 13, 100
  - take its remainder after division by $k, which is never negative
  = $x % $k

square_it: int -> int
  - square it
  - multiply it by itself
  = $x ** 2

absolute_value: int -> int
  - take its absolute value
  - drop its sign
  = abs($x)

opposite: int -> int
  - change its sign
  = -$x

half: int -> int
  - halve it, rounding down
  - divide it by 2, rounding down
  = $x // 2

digit_sum: int -> int
  - add up its decimal digits, ignoring the sign
  - take the sum of its decimal digits, without the sign
  = sum(int(d) for d in str(abs($x)))
  =
      rest = abs($x)
      $y = 0
      while rest:
          $y += rest % 10
          rest //= 10

digit_count: int -> int
  - count its decimal digits, ignoring the sign
  = len(str(abs($x)))

reverse_digits: int -> int
  - reverse its decimal digits, keeping the sign
  =
      digits = int(str(abs($x))[::-1])
      $y = -digits if $x < 0 else digits

largest_digit: int -> int
  - take its largest decimal digit
  = max(int(d) for d in str(abs($x)))

ones: int -> int
  - count the ones in the binary form of its absolute value
  = bin(abs($x)).count("1")
  =
      $y = 0
      rest = abs($x)
      while rest:
          $y += rest % 2
          rest //= 2

round_up: int -> int with k in 4, 6, 10
  - round it up to a multiple of $k
  = -(-$x // $k) * $k

gcd: int -> int with k in 12, 30, 36
  - take the greatest common divisor of it and $k
  =
      $y, other = abs($x), $k
      while other:
          $y, other = other, $y % other

at_least: int -> int with k in 0, 5, 20
  - take the larger of it and $k
  = max($x, $k)

triangular: int -> int
  - add up all numbers from 1 to its absolute value
  = abs($x) * (abs($x) + 1) // 2

root: int -> int
  - take the square root of its absolute value, rounded down
  =
      import math
      $y = math.isqrt(abs($x))
""")

EXPANSIONS = operations(r"""
digits: int -> ints
  - list its decimal digits from left to right, ignoring the sign
  = [int(d) for d in str(abs($x))]

bits: int -> ints
  - list the binary digits of its absolute value from left to right
  = [int(d) for d in bin(abs($x))[2:]]

divisors: int -> ints
  - list the positive divisors of its absolute value in ascending order (none for 0)
  =
      size = abs($x)
      $y = []
      small = 1
      while small * small <= size:
          if size % small == 0:
              $y.append(small)
              if small * small != size:
                  $y.append(size // small)
          small += 1
      $y.sort()

prime_factors: int -> ints
  - list the prime factors of its absolute value in ascending order, each as often as it divides (none for 0 and
    1)
  =
      $y = []
      rest = abs($x)
      factor = 2
      while factor * factor <= rest:
          if rest % factor == 0:
              $y.append(factor)
              rest //= factor
          else:
              factor += 1
      if rest > 1:
          $y.append(rest)

multiples: int -> ints with n in 3, 4, 5
  - list its first $n multiples, beginning with itself
  = [$x * i for i in range(1, $n + 1)]
""")
