"""Faults that the suite must find: a change of one place, and the tests that turn red.

Each is a mistake that is easily made in such a kernel. Tests are chosen to be quick.
"""

from typing import NamedTuple

FUZZ = "tests/ops/test_fuzz.py"
CPP = "tests/ops/test_gyroscope_cpp.py"
TRITON = "tests/ops/test_gyroscope_triton.py"
INTERPRET = "TRITON_INTERPRET=1"

CPP_FUZZ = ("TIMO_FUZZ=16,32,43,64,75,96", FUZZ, "-k", "gyroscope_attention")
CPP_PAIRS = (CPP, "-k", "test_parity and amx_emulated")
CPP_FAR = (CPP, "-k", "(far_below or renewed or outlasts) and dtype0")
CPP_OFFSETS = ("tests/ops/test_far_offsets.py", "-k", "date")
MEDIAN_FUZZ = ("TIMO_FUZZ=16,32,48", FUZZ, "-k", "temporal_median")
DEVIATION_FUZZ = ("TIMO_FUZZ=16,32,48", FUZZ, "-k", "median_deviation")
TRITON_FUZZ = (INTERPRET, "TIMO_FUZZ=0,24,29", FUZZ, "-k", "gyroscope_attention")
TRITON_HUNDREDS = (INTERPRET, TRITON, "-k", "hundreds")
TRITON_DATES = (INTERPRET, TRITON, "-k", "test_parity and none and dtype2")
TRITON_MASKS = (INTERPRET, TRITON, "-k", "several_blocks and position")
TRITON_BLOCKS = (INTERPRET, TRITON, "-k", "far_below and dtype0")
TRITON_TILES = (INTERPRET, TRITON, "-k", "several_blocks and none")
TRITON_WIDE = (INTERPRET, TRITON, "-k", "wide_tiles and none")
TRITON_SLOTS = (INTERPRET, TRITON, "-k", "far_slots")
TRITON_ATOMIC = (INTERPRET, TRITON, "-k", "any_order and none")
TRITON_ATOMIC_OWN = (INTERPRET, TRITON, "-k", "own_maximum and dtype3")
TRITON_MEDIAN_FUZZ = (INTERPRET, "TIMO_FUZZ=0,8,16", FUZZ, "-k", "temporal_median")
TRITON_DEVIATION_FUZZ = (INTERPRET, "TIMO_FUZZ=0,8,16", FUZZ, "-k", "median_deviation")
TRITON_DEVIATION = (
    INTERPRET, "tests/ops/test_median_deviation.py", "-k", "parity and position and triton"
)  # fmt: skip
MEDIAN_OFFSETS = (INTERPRET, "tests/ops/test_temporal_median.py", "-k", "beyond and triton")
MAXIMUM = ("tests/ops/test_temporal_maximum.py", "-k", "cpp")
TRITON_MAXIMUM = (INTERPRET, MAXIMUM[0], "-k", "triton")

GATHER = ("tests/ops/test_gather_units.py", "-k", "(parity or gradient) and cpp")
SCATTER = ("tests/ops/test_scatter_units.py", "-k", "parity and cpp")
LOSS = ("tests/ops/test_masked_pixel_loss.py", "-k", "parity and cpp and not date and not none")
TRITON_GATHER = (INTERPRET, GATHER[0], "-k", "(parity or gradient) and triton")
TRITON_SCATTER = (INTERPRET, SCATTER[0], "-k", "parity and triton")
TRITON_LOSS = (INTERPRET, LOSS[0], "-k", "parity and triton and date")

EMULATED = "tests/ops/test_cuda_emulated.py"
CUDA_GATHER = (EMULATED, "-k", "gather_units and not random")
CUDA_LARGE = (EMULATED, "-k", "large_tiles")
CUDA_SCATTER = (EMULATED, "-k", "scatter_units and not random")
CUDA_LOSS = (EMULATED, "-k", "masked_pixel_loss")
CUDA_MEDIAN = (EMULATED, "-k", "test_temporal_median")
CUDA_ORDER = (EMULATED, "-k", "every_order")
CUDA_FENCES = (EMULATED, "-k", "beside")
CUDA_MILLION = (EMULATED, "-k", "million")

ATTENTION = "csrc/cpu/gyroscope_attention"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # occurs once
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "cpp: strides of dates and positions exchanged",
        f"{ATTENTION}.h",
        "t * x.stride[1] + n * x.stride[2] +",
        "t * x.stride[2] + n * x.stride[1] +",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: 32-bit offset of a date",
        f"{ATTENTION}.h",
        "b * x.stride[0] + t * x.stride[1] +",
        "b * x.stride[0] + static_cast<int32_t>(t * x.stride[1]) +",
        CPP_OFFSETS,
    ),
    Mutant(
        "cpp: validity transposed",
        f"{ATTENTION}.h",
        "t * a.valid_stride[1] + n * a.valid_stride[2]]",
        "t * a.valid_stride[2] + n * a.valid_stride[1]]",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: a date attends to itself",
        f"{ATTENTION}_forward.h",
        "energy = s != here && Tier",
        "energy = s >= 0 && Tier",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: keys past the end are counted",
        f"{ATTENTION}_spatial.h",
        "const int64_t real = std::min(group, count - m), made",
        "const int64_t real = std::min(group, count - m + 1), made",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: sums are not rescaled to a new reference",
        f"{ATTENTION}_spatial.h",
        "Tier::store(x, Tier::load(x) * half * half);",
        "Tier::store(x, Tier::load(x));",
        CPP_FAR,
    ),
    Mutant(
        "cpp: rescaled by the inverse factor",
        f"{ATTENTION}_spatial.h",
        "Tier::exp2((old - top[j]) * 0.5f)",
        "Tier::exp2((top[j] - old) * 0.5f)",
        CPP_FAR,
    ),
    Mutant(
        "cpp: a sum is rescaled at once, by what may underflow",
        f"{ATTENTION}_spatial.h",
        "Tier::load(x) * half * half",
        "Tier::load(x) * (half * half)",
        CPP_FAR,
    ),
    Mutant(
        "cpp: a panel is merged before its last block of keys",
        f"{ATTENTION}_spatial.h",
        "if (end == keys.count) complete(i);",
        "if (n == 0) complete(i);",
        CPP_FAR,
    ),
    Mutant(
        "cpp: delta of the first date is left out where all dates use all keys",
        f"{ATTENTION}_backward.h",
        "std::accumulate(delta, delta + dates.count, 0.f)",
        "std::accumulate(delta + 1, delta + dates.count, 0.f)",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: the old reference is kept",
        f"{ATTENTION}_spatial.h",
        "keep ? old : top[j]",
        "keep ? old : old",
        CPP_FAR,
    ),
    Mutant(
        "cpp: dates never get a reference of their own",
        f"{ATTENTION}_spatial.h",
        "if (mass >= mass_limit ||",
        "if (mass >= 0 ||",
        CPP_FAR,
    ),
    Mutant(
        "cpp: no gradient of dates with a reference of their own",
        f"{ATTENTION}_backward.h",
        "if (g.share[scalar] != own_reference) continue;",
        "if (g.share[scalar] <= own_reference) continue;",
        CPP_FAR,
    ),
    Mutant(
        "cpp: sums in float16",
        f"{ATTENTION}_kernel.h",
        "Tier::store(to, into == Into::add ? Tier::load(to) + acc[i][j] : acc[i][j]);",
        "F sum = into == Into::add ? Tier::load(to) + acc[i][j] : acc[i][j];\n"
        "      for (int l = 0; l < lanes; ++l) sum[l] = widen(narrow_to(sum[l], f16{}));\n"
        "      Tier::store(to, sum);",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: last channel of a tail is lost",
        f"{ATTENTION}_kernel.h",
        "for (int64_t i = 0; i < count; ++i) part[i] = widen(p[i]);",
        "for (int64_t i = 0; i + 1 < count; ++i) part[i] = widen(p[i]);",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: one channel too many is written",
        f"{ATTENTION}_kernel.h",
        "for (int64_t i = 0; i < count; ++i) p[i] = narrow_to(part[i], Stored{});",
        "for (int64_t i = 0; i < count + 1; ++i) p[i] = narrow_to(part[i], Stored{});",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: no gradient of the gate",
        f"{ATTENTION}_temporal.h",
        "dgate -= Tier::load(w.denergy[0] + (i + j) * row + s * lanes);",
        "dgate -= F{};",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: delta is left out",
        f"{ATTENTION}_backward.h",
        "+ j] = share * g.delta[scalar];",
        "+ j] = 0 * g.delta[scalar];",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: dq_median without the scale",
        f"{ATTENTION}_backward.h",
        "load_part(dq + d, a.D - d) * static_cast<float>(a.scale)",
        "load_part(dq + d, a.D - d)",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: gradients of invalid entries are not cleared",
        f"{ATTENTION}.cpp",
        "clear(a.dq, t, h), clear(a.dk, t, h), clear(a.dv, t, h);",
        "clear(a.dq, t, h), clear(a.dv, t, h);",
        CPP_FUZZ,
    ),
    Mutant(
        "cpp: numbers of a pair exchanged",
        f"{ATTENTION}_pack.h",
        "Tier::zip(load_part(row[2 * i] + d, D - d), load_part(row[2 * i + 1] + d, D - d));",
        "Tier::zip(load_part(row[2 * i + 1] + d, D - d), load_part(row[2 * i] + d, D - d));",
        CPP_PAIRS,
    ),
    Mutant(
        "cpp: operands past the values of a panel are left as they were",
        f"{ATTENTION}_backward.h",
        "std::fill_n(w.vT + panels * dates.count * w.v_size, depth * width, 0.f);",
        "",
        CPP_PAIRS,
    ),
    Mutant(
        "cpp: a lone row of tiles is left out",
        f"{ATTENTION}_tier_amx.h",
        "if (m < M)",
        "if (m + 16 < M)",
        CPP_PAIRS,
    ),
    Mutant(
        "cpp: energies of pairs are not scaled",
        f"{ATTENTION}_kernel.h",
        "  energy *= scale;\n",
        "",
        (CPP, "-k", "test_scale and amx_emulated"),
    ),
    Mutant(
        "cpp: denormal numbers stay flushed",
        f"{ATTENTION}.h",
        "~FlushDenormals() { _mm_setcsr(old); }",
        "~FlushDenormals() { _mm_setcsr(old | 0x8040); }",
        (CPP, "-k", "denormal"),
    ),
    Mutant(
        "cpp: upper median of an even count",
        "csrc/cpu/temporal_median.h",
        "return (count - 1) / 2;",
        "return count / 2;",
        MEDIAN_FUZZ,
    ),
    Mutant(
        "cpp: the last date of equals is selected",
        "csrc/cpu/temporal_median.h",
        "for (int i = static_cast<int>(columns.dates.size()) - 1; i >= 0; --i)",
        "for (int i = 0; i < static_cast<int>(columns.dates.size()); ++i)",
        MEDIAN_FUZZ,
    ),
    Mutant(
        "cpp: a step of the sorting network is left out",
        "csrc/cpu/temporal_median.h",
        "for (int i = j; i < std::min(j + k, count - k); ++i)",
        "for (int i = j; i < std::min(j + k, count - k - 1); ++i)",
        MEDIAN_FUZZ,
    ),
    Mutant(
        "cpp: every tile is projected by the first channels of the weight",
        "csrc/cpu/median_deviation.cpp",
        "(weight + (c - h * D),",
        "(weight,",
        DEVIATION_FUZZ,
    ),
    Mutant(
        "cpp: a median moves the deviation of no other date",
        "csrc/cpu/median_deviation.cpp",
        "rest[d] = widen(dvalues[d]) - weight[d] * total;",
        "rest[d] = widen(dvalues[d]);",
        DEVIATION_FUZZ,
    ),
    Mutant(
        "cpp: gradients of invalid dates",
        "csrc/cpu/median_deviation.cpp",
        "if (!usable(a, b, n, t)) {",
        "if (t < 0) {",
        DEVIATION_FUZZ,
    ),
    Mutant(
        "cpp: the weight's gradient misses the last chunk",
        "csrc/cpu/median_deviation.cpp",
        "for (int64_t chunk = 0; chunk < chunks; ++chunk) sum +=",
        "for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk) sum +=",
        DEVIATION_FUZZ,
    ),
    Mutant(
        "triton: strides of dates and positions exchanged",
        "kernels/gyroscope_attention_forward.py",
        "            p_k += k_s[1]\n            p_v += v_s[1]\n",
        "            p_k += k_s[1]\n            p_v += v_s[2]\n",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: a date attends to itself",
        "kernels/gyroscope_attention_forward.py",
        "e = tl.where((t != s)[None, :] & m_s[:, None], e,",
        "e = tl.where((t >= 0)[None, :] & m_s[:, None], e,",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: a key past the end is counted",
        "kernels/gyroscope_attention_blocks.py",
        "tl.arange(0, e.shape[1]) < N)[None, :], e, ",
        "tl.arange(0, e.shape[1]) < N + 1)[None, :], e, ",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: the greatest energy of the last keys alone",
        "kernels/gyroscope_attention_forward.py",
        "        greatest = tl.maximum(greatest, e)\n        p_k +=",
        "        greatest = e\n        p_k +=",
        TRITON_HUNDREDS,
    ),
    Mutant(
        "triton: products of dates, a date attends to itself",
        "kernels/gyroscope_attention_forward.py",
        "e = tl.where(others[None, :, :] & usable",
        "e = tl.where((others[None, :, :] | True) & usable",
        TRITON_DATES,
    ),
    Mutant(
        "triton: products of dates, no gradient of the gate",
        "kernels/gyroscope_attention_backward.py",
        "dgate -= tl.sum(de, 2)",
        "dgate -= 0.0 * tl.sum(de, 2)",
        TRITON_DATES,
    ),
    Mutant(
        "triton: validity transposed",
        "kernels/gyroscope_attention_blocks.py",
        "p = p + tl.arange(0, R)[:, None] * TV + tl.arange(0, TV)[None, :]",
        "p = p + tl.arange(0, R)[:, None] + tl.arange(0, TV)[None, :] * R",
        TRITON_MASKS,
    ),
    Mutant(
        "triton: dates never get a reference of their own",
        "kernels/gyroscope_attention.py",
        "LEAST=1 / most(q.dtype)",
        "LEAST=0.0",
        TRITON_BLOCKS,
    ),
    Mutant(
        "triton: sums in float16",
        "kernels/gyroscope_attention_forward.py",
        "added = added + (tl.dot(p, v, acc[i], input_precision=PRECISION),)",
        "added = added + (tl.dot(p, v, acc[i], input_precision=PRECISION)"
        ".to(tl.float16).to(tl.float32),)",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: no gradient of the gate",
        "kernels/gyroscope_attention_backward.py",
        "dgate -= de\n",
        "dgate -= 0.0 * de\n",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: delta of keys is left out",
        "kernels/gyroscope_attention_backward_keys.py",
        "        dp -= load_numbers(p_delta + start, N - start, BM, 0.0, TAIL)[None, :]\n",
        "        pass\n",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: the last queries are left out",
        "kernels/gyroscope_attention_backward_values.py",
        "    if whole < end:\n",
        "    if whole < 0:\n",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: what lies beyond a tail is read as values",
        "kernels/gyroscope_attention_blocks.py",
        "        m = m & (tl.arange(0, R) < count)[:, None]",
        "        m = m & (tl.arange(0, R) < count + 1)[:, None]",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: tiles of dates that do not fit have no masks",
        "kernels/gyroscope_attention.py",
        "return dates % sum(tile.widths) == 0 and",
        "return",
        TRITON_TILES,
    ),
    Mutant(
        "triton: factors are lost on their way to registers",
        "kernels/gyroscope_attention_blocks.py",
        "x.dtype), x.to(tl.float32)).to(x.dtype)",
        "x.dtype)).to(x.dtype)",
        TRITON_WIDE,
    ),
    Mutant(
        "triton: pieces of a sum change places",
        "kernels/gyroscope_attention_blocks.py",
        "out = pieces(a, C) + pieces(b, C)",
        "out = pieces(b, C) + pieces(a, C)",
        TRITON_WIDE,
    ),
    Mutant(
        "triton: delta is left out",
        "kernels/gyroscope_attention_backward_queries.py",
        "        dp -= delta[:, None]\n",
        "        dp -= 0.0 * delta[:, None]\n",
        TRITON_FUZZ,
    ),
    Mutant(
        "triton: delta of valid keys is left out",
        "kernels/gyroscope_attention_blocks.py",
        "PARTS: tl.constexpr = 1 if ones.dtype == tl.float32 else 2",
        "PARTS: tl.constexpr = 0",
        TRITON_MASKS,
    ),
    Mutant(
        "triton: only the first tile of dates",
        "kernels/gyroscope_attention.py",
        "return x.sum(0) if len(x) > 1 else x[0]",
        "return x[0]",
        TRITON_TILES,
    ),
    Mutant(
        "triton: all keys add to the first ones",
        "kernels/gyroscope_attention_backward_queries.py",
        "        p_dk += BN * dk_s[2]\n",
        "",
        TRITON_ATOMIC,
    ),
    Mutant(
        "triton: additions to memory that is not 0",
        "kernels/gyroscope_attention.py",
        "slots(1).zero_()",
        "slots(1)",
        TRITON_ATOMIC,
    ),
    Mutant(
        "triton: rows of the second launch are not added",
        "kernels/gyroscope_attention.py",
        "*inputs, grad, usable, own, delta, some, dk_slots, own=True, columned=True,",
        "*inputs, grad, usable, own, delta, some, slots(1), own=True, columned=True,",
        TRITON_ATOMIC_OWN,
    ),
    Mutant(
        "triton: upper median of an even count",
        "kernels/temporal_median.py",
        "middle = ((count - 1) // 2)[None, :]",
        "middle = (count // 2)[None, :]",
        TRITON_MEDIAN_FUZZ,
    ),
    Mutant(
        "triton: a median moves the deviation of no other date",
        "kernels/median_deviation.py",
        "rest -= weight * tl.load",
        "rest -= 0.0 * tl.load",
        TRITON_DEVIATION_FUZZ,
    ),
    Mutant(
        "triton: deviations of invalid dates",
        "kernels/median_deviation.py",
        "tl.where(m_t, x - value.to(tl.float32)[None, :], 0.0)",
        "(x - value.to(tl.float32)[None, :])",
        TRITON_DEVIATION_FUZZ,
    ),
    Mutant(
        "triton: the weight's gradient of one program",
        "kernels/median_deviation.py",
        "return partial.sum(0)",
        "return partial[0]",
        TRITON_DEVIATION,
    ),
    Mutant(
        "triton: 32-bit offset of the sums of a tile of dates",
        "kernels/gyroscope_attention_backward_keys.py",
        "p_dk += tile.to(tl.int64) * dk_s[0]",
        "p_dk += tile * dk_s[0]",
        TRITON_SLOTS,
    ),
    Mutant(
        "triton: 32-bit offset of a date's validity",
        "kernels/temporal_median.py",
        "t = tl.arange(0, DATES).to(tl.int64)[:, None]",
        "t = tl.arange(0, DATES)[:, None]",
        MEDIAN_OFFSETS,
    ),
    Mutant(
        "cpp units: a tile is not cleared",
        "csrc/cpu/gather_units.cpp",
        "    std::fill(tile, tile + u.C * S * S, Tile{});\n",
        "",
        GATHER,
    ),
    Mutant(
        "cpp units: halo on the wrong side",
        "csrc/cpu/gather_units.cpp",
        "left = p.j * u.unit - a.before;",
        "left = p.j * u.unit - a.after;",
        GATHER,
    ),
    Mutant(
        "cpp units: gradient misses the tiles above",
        "csrc/cpu/gather_units.cpp",
        "std::max<int64_t>(i - ceil_div(a.after, u.unit), 0)",
        "std::max<int64_t>(i, 0)",
        GATHER,
    ),
    Mutant(
        "cpp units: gradient without the scale",
        "csrc/cpu/gather_units.cpp",
        "const Affine f{band(u, c).scale, -0.0f};",
        "const Affine f{1.0f, -0.0f};",
        GATHER,
    ),
    Mutant(
        "cpp units: a masked unit takes the next token",
        "csrc/cpu/scatter_units.cpp",
        "return found != end && *found == l ?",
        "return found != end ?",
        SCATTER,
    ),
    Mutant(
        "cpp units: the last row is left out of a sum",
        "csrc/cpu/scatter_units.cpp",
        "std::min((chunk + 1) * scatter_units_chunk, a.B * a.L);",
        "std::min((chunk + 1) * scatter_units_chunk, a.B * a.L - 1);",
        SCATTER,
    ),
    Mutant(
        "cpp units: the mask token's gradient in low precision",
        "csrc/cpu/scatter_units.cpp",
        "sum[d] += widen(grad[d]);",
        "sum[d] = widen(narrow_to(sum[d] + widen(grad[d]), Stored{}));",
        SCATTER,
    ),
    Mutant(
        "cpp units: variance by the count",
        "csrc/cpu/masked_pixel_loss.cpp",
        "std::max(count - 1, 1.0)",
        "std::max(count, 1.0)",
        LOSS,
    ),
    Mutant(
        "cpp units: half of the loss's gradient",
        "csrc/cpu/masked_pixel_loss.cpp",
        "factor = 2 * *a.grad",
        "factor = 1 * *a.grad",
        LOSS,
    ),
    Mutant(
        "cpp units: gradient at invalid pixels",
        "csrc/cpu/masked_pixel_loss.cpp",
        "ok[x * row.ok_step] ? out[x] : Pred{}",
        "ok[x * row.ok_step] ? out[x] : out[x]",
        LOSS,
    ),
    Mutant(
        "triton units: the halo shows what is masked",
        "kernels/gather_units.py",
        "    m &= place >= 0\n",
        "    m &= place >= -1\n",
        TRITON_GATHER,
    ),
    Mutant(
        "triton units: gradient misses the tiles ahead",
        "kernels/gather_units.py",
        "AHEAD: tl.constexpr = (BEFORE + UNIT - 1) // UNIT",
        "AHEAD: tl.constexpr = BEFORE // UNIT",
        TRITON_GATHER,
    ),
    Mutant(
        "cpp maximum: of equal dates the latest",
        "csrc/cpu/temporal_maximum.cpp",
        "!(x <= best[l])",
        "!(x < best[l])",
        MAXIMUM,
    ),
    Mutant(
        "cpp maximum: a NaN is outdone",
        "csrc/cpu/temporal_maximum.cpp",
        " & (best[l] == best[l]);",
        " | (best[l] != best[l]);",
        MAXIMUM,
    ),
    Mutant(
        "cpp maximum: validity of the wrong rows",
        "csrc/cpu/temporal_maximum.cpp",
        "t, y / a.factor, x",
        "t, y % a.h, x",
        MAXIMUM,
    ),
    Mutant(
        "cpp maximum: corners instead of centres",
        "csrc/cpu/temporal_maximum.cpp",
        "2 * i + 1 - factor",
        "2 * i + 2 - factor",
        MAXIMUM,
    ),
    Mutant(
        "cpp maximum: the last entries give no gradient",
        "csrc/cpu/temporal_maximum.cpp",
        "* factor + factor / 2)",
        "* factor + factor / 2 - 1)",
        MAXIMUM,
    ),
    Mutant(
        "cpp maximum: every date has the gradient",
        "csrc/cpu/temporal_maximum.cpp",
        "date[l] == t ?",
        "date[l] >= t ?",
        MAXIMUM,
    ),
    Mutant(
        "triton maximum: invalid dates count as 0",
        "kernels/temporal_maximum.py",
        "take = take & m_t",
        "take = take & m",
        TRITON_MAXIMUM,
    ),
    Mutant(
        "triton maximum: the first entries give no gradient",
        "kernels/temporal_maximum.py",
        "// 2 + 1 - factor",
        "// 2 + 2 - factor",
        TRITON_MAXIMUM,
    ),
    Mutant(
        "triton maximum: entries beside the border are mixed in",
        "kernels/temporal_maximum.py",
        "low + 1 < size",
        "low < size",
        TRITON_MAXIMUM,
    ),
    Mutant(
        "triton units: a unit is its successor",
        "kernels/gather_units.py",
        "mask=m, other=0) < u",
        "mask=m, other=0) <= u",
        TRITON_GATHER,
    ),
    Mutant(
        "triton units: the mask token's gradient holds all rows",
        "kernels/scatter_units.py",
        "tl.where(visible, 0.0, grad.to(tl.float32))",
        "tl.where(visible, grad.to(tl.float32), grad.to(tl.float32))",
        TRITON_SCATTER,
    ),
    Mutant(
        "triton units: variance by the count",
        "kernels/masked_pixel_loss.py",
        "spread / tl.maximum(count - 1, 1) + EPS",
        "spread / tl.maximum(count, 1) + EPS",
        TRITON_LOSS,
    ),
    Mutant(
        "triton units: half of the loss's gradient",
        "kernels/masked_pixel_loss.py",
        "factor = 2.0 *",
        "factor = 1.0 *",
        TRITON_LOSS,
    ),
    Mutant(
        "cuda: no barrier between finding the neighbours and using them",
        "csrc/cuda/gather_units.cu",
        "offset_of(u, c0 + c)};\n  __syncthreads();\n",
        "offset_of(u, c0 + c)};\n",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: halo on the wrong side",
        "csrc/cuda/gather_units.cu",
        "top = p.i * u.unit - a.before + first",
        "top = p.i * u.unit - a.after + first",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: tiles are written before they are whole",
        "csrc/cuda/gather_units.cu",
        "  __syncthreads();\n  write(out",
        "  write(out",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: tiles begin at 16 bytes",
        "csrc/cuda/gather_units.cu",
        "reinterpret_cast<uintptr_t>(out) % 16 / sizeof(Tile)",
        "reinterpret_cast<uintptr_t>(out) % 16 / sizeof(Tile) * 0",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: every piece of a band begins at its first row",
        "csrc/cuda/gather_units.cu",
        "u.unit - a.before + first, left",
        "u.unit - a.before, left",
        CUDA_LARGE,
    ),
    Mutant(
        "cuda: the second group of bands reads the first",
        "csrc/cuda/gather_units.cu",
        "pixel<Stored>(u, b, p.t, c0, top, left)",
        "pixel<Stored>(u, b, p.t, 0, top, left)",
        CUDA_LARGE,
    ),
    Mutant(
        "cuda: neighbours are looked for one unit too late",
        "csrc/cuda/gather_units.cu",
        "max(k - back, int64_t{0})",
        "max(k - back + 1, int64_t{0})",
        CUDA_LARGE,
    ),
    Mutant(
        "cuda: a word of validity is that of its first pixel",
        "csrc/cuda/gather_units.cu",
        "word >> 8 * v & 0xff",
        "word & 0xff",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: all four pixels are as visible as the first",
        "csrc/cuda/gather_units.cu",
        "same = vector && v;",
        "same = v;",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: gradient misses the tiles below",
        "csrc/cuda/gather_units.cu",
        "r <= (y + before) / unit; ++r)",
        "r <= y / unit; ++r)",
        CUDA_GATHER,
    ),
    Mutant(
        "cuda: a token goes one place too far",
        "csrc/cuda/scatter_units.cu",
        "k = first + __ffs(votes) - 1;",
        "k = first + __ffs(votes);",
        CUDA_SCATTER,
    ),
    Mutant(
        "cuda: the last row of a chunk is lost",
        "csrc/cuda/scatter_units.cu",
        "min(a.B * a.L - first, int64_t{chunk}));",
        "min(a.B * a.L - first, int64_t{chunk - 1}));",
        CUDA_SCATTER,
    ),
    Mutant(
        "cuda: lanes beyond the ids read and vote",
        "csrc/cuda/scatter_units.cu",
        "const bool here = first + lane < a.K && a.ids",
        "const bool here = a.ids",
        CUDA_FENCES,
    ),
    Mutant(
        "cuda: sums of a block overwrite the last ones",
        "csrc/cuda/units.h",
        "  __syncthreads();  // the last sum has been read\n",
        "",
        CUDA_ORDER,
    ),
    Mutant(
        "cuda: ids that no frame has are looked up",
        "csrc/cuda/units.h",
        "const bool known = id >= 0 && id < grid.units;",
        "const bool known = true;",
        CUDA_FENCES,
    ),
    Mutant(
        "cuda: vectors at any address",
        "csrc/cuda/units.h",
        " && aligned(u.frames, 4 * sizeof(Stored));",
        ";",
        CUDA_FENCES,
    ),
    Mutant(
        "cuda: variance by the count",
        "csrc/cuda/masked_pixel_loss.cu",
        "squares / max(count - 1, 1) +",
        "squares / max(count, 1) +",
        CUDA_LOSS,
    ),
    Mutant(
        "cuda: gradient at invalid pixels",
        "csrc/cuda/masked_pixel_loss.cu",
        "four.ok[v] ? error * factor : 0.0f",
        "error * factor",
        CUDA_LOSS,
    ),
    Mutant(
        "cuda: equal squares are all rounded alike",
        "csrc/cuda/masked_pixel_loss.cu",
        "const float term = x - excess,",
        "const float term = x,",
        CUDA_MILLION,
    ),
    Mutant(
        "cuda: upper median of an even count",
        "csrc/cuda/temporal_median.cu",
        "middle = (count - 1) / 2;",
        "middle = count / 2;",
        CUDA_MEDIAN,
    ),
    Mutant(
        "cuda: the gradient goes to the date before",
        "csrc/cuda/temporal_median.cu",
        "chosen == t ? grad[i]",
        "chosen == t + 1 ? grad[i]",
        CUDA_MEDIAN,
    ),
]

SAMPLE = {
    "cpp: validity transposed",
    "cpp: upper median of an even count",
    "triton: a date attends to itself",
    "triton: upper median of an even count",
}
