"""The roofline: FLOPs and bytes of small programs against numbers worked out by hand, and the command's output."""

import json

import jax
import pytest

from benchmarks import hlo, roofline
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.sharding import make_mesh

CONVOLUTION = """
ENTRY %main (x: bf16[2,8,8,4], k: bf16[6,3,3,4], g: bf16[2,4,4,6]) -> bf16[2,4,4,6] {{
  %x = bf16[2,8,8,4]{{3,2,1,0}} parameter(0)
  %k = bf16[6,3,3,4]{{3,2,1,0}} parameter(1)
  %g = bf16[2,4,4,6]{{3,2,1,0}} parameter(2)
  %conv = ({result}, u8[4096]{{0}}) custom-call({operands}), window={{size=3x3 stride=2x2}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}", backend_config={{"cudnn_conv_backend_config":{{}}}}
  ROOT %y = {result} get-tuple-element(%conv), index=0
}}
"""  # noqa: E501
ATTENTION = """
ENTRY %main (q: bf16[2,16,4,8], k: bf16[2,32,4,8], s: f32[2,4,16]) -> bf16[2,4,16,8] {
  %q = bf16[2,16,4,8]{3,2,1,0} parameter(0)
  %k = bf16[2,32,4,8]{3,2,1,0} parameter(1)
  %forward = (bf16[2,4,16,8]{3,1,2,0}, f32[2,4,16]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/jvp()/attention"}
  %y = bf16[2,4,16,8]{3,1,2,0} get-tuple-element(%forward), index=0
  %s = f32[2,4,16]{2,1,0} get-tuple-element(%forward), index=1
  %b = bf16[2,16,4,8]{3,2,1,0} bitcast(%y)
  %backward = (bf16[2,4,16,8]{3,1,2,0}, bf16[2,4,32,8]{3,1,2,0}, bf16[2,4,32,8]{3,1,2,0}, u8[64]{0}) custom-call(%q, %k, %k, %s, %b, /*index=5*/%b), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %dq = bf16[2,4,16,8]{3,1,2,0} get-tuple-element(%backward), index=0
}
"""  # noqa: E501
SCAN = """HloModule jit_scan, is_scheduled=true

%weights_to_bf16 (stack: f32[6,64,32], i: s32[]) -> bf16[1,64,32] {
  %stack = f32[6,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,32]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %bf16 = bf16[1,64,32]{2,1,0} convert(%slice)
}

%keep (stack: bf16[6,16,32], i: s32[], y: bf16[16,32]) -> bf16[6,16,32] {
  %stack = bf16[6,16,32]{2,1,0} parameter(0)
  %y = bf16[16,32]{1,0} parameter(2)
  %row = bf16[1,16,32]{2,1,0} bitcast(%y)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %update = bf16[6,16,32]{2,1,0} dynamic-update-slice(%stack, %row, %i, %zero, %zero)
}

%gemm (x: bf16[16,64], w: bf16[64,32]) -> bf16[16,32] {
  %x = bf16[16,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = bf16[16,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[6,16,32], f32[6,64,32], bf16[16,64])) -> (s32[], bf16[6,16,32], f32[6,64,32], bf16[16,64]) {
  %state = (s32[], bf16[6,16,32]{2,1,0}, f32[6,64,32]{2,1,0}, /*index=3*/bf16[16,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %kept = bf16[6,16,32]{2,1,0} get-tuple-element(%state), index=1
  %stack = f32[6,64,32]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[16,64]{1,0} get-tuple-element(%state), index=3
  %convert_fusion = bf16[1,64,32]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%weights_to_bf16
  %w = bf16[64,32]{1,0} bitcast(%convert_fusion)
  %gemm_fusion = bf16[16,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm
  %keep_fusion = bf16[6,16,32]{2,1,0} fusion(%kept, %i, %gemm_fusion), kind=kLoop, calls=%keep
  ROOT %next = (s32[], bf16[6,16,32]{2,1,0}, f32[6,64,32]{2,1,0}, bf16[16,64]{1,0}) tuple(%i, %keep_fusion, %stack, %x)
}

%condition (state: (s32[], bf16[6,16,32], f32[6,64,32], bf16[16,64])) -> pred[] {
  %state = (s32[], bf16[6,16,32]{2,1,0}, f32[6,64,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (stack: f32[6,64,32], x: bf16[16,64]) -> bf16[6,16,32] {
  %stack = f32[6,64,32]{2,1,0} parameter(0)
  %x = bf16[16,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %nothing = bf16[] constant(0)
  %zeros = bf16[6,16,32]{2,1,0} broadcast(%nothing), dimensions={}
  %start = (s32[], bf16[6,16,32]{2,1,0}, f32[6,64,32]{2,1,0}, bf16[16,64]{1,0}) tuple(%zero, %zeros, %stack, %x)
  %while = (s32[], bf16[6,16,32]{2,1,0}, f32[6,64,32]{2,1,0}, bf16[16,64]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %y = bf16[6,16,32]{2,1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def only(text: str) -> hlo.Kernel:
    (kernel,) = hlo.kernels(text)
    return kernel


def moved(kernel: hlo.Kernel) -> tuple[int, int, int]:
    return kernel.flops, kernel.read, kernel.written


def test_a_product():
    kernel = only("""
ENTRY %main (a: f32[4,16,8], b: f32[4,8,32]) -> f32[4,16,32] {
  %a = f32[4,16,8]{2,1,0} parameter(0)
  %b = f32[4,8,32]{2,1,0} parameter(1)
  ROOT %c = f32[4,16,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}
""")  # noqa: E501
    assert (kernel.kind, kernel.dtype, kernel.times) == (hlo.PRODUCT, "float32", 1)
    assert moved(kernel) == (2 * 4 * 16 * 32 * 8, 4 * (4 * 16 * 8 + 4 * 8 * 32), 4 * 4 * 16 * 32)


def test_a_product_by_cublas_without_its_workspace():
    kernel = only("""
ENTRY %main (a: bf16[64,16], b: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[16,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot"}, backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %c = bf16[16,32]{1,0} get-tuple-element(%gemm), index=0
}
""")  # noqa: E501
    assert (kernel.kind, kernel.dtype, kernel.op_name) == (hlo.PRODUCT, "bf16", "jit(f)/dot")
    assert moved(kernel) == (2 * 16 * 32 * 64, 2 * (64 * 16 + 64 * 32), 2 * 16 * 32)


@pytest.mark.parametrize(
    ("target", "result", "operands", "read", "written"),
    [
        ("convForward", "bf16[2,4,4,6]{3,2,1,0}", "%x, %k", 512 + 216, 192),
        ("convBackwardInput", "bf16[2,8,8,4]{3,2,1,0}", "%g, %k", 192 + 216, 512),
        ("convBackwardFilter", "bf16[6,3,3,4]{3,2,1,0}", "%x, %g", 512 + 192, 216),
    ],
)
def test_a_convolution_and_its_gradients_are_as_many_flops(target, result, operands, read, written):
    """Each output place of the forward pass (2 x 4 x 4 x 6) takes a kernel of 3 x 3 x 4, in all three directions."""
    kernel = only(CONVOLUTION.format(target=target, result=result, operands=operands))
    assert (kernel.kind, kernel.dtype) == (hlo.CONVOLUTION, "bf16")
    assert moved(kernel) == (2 * 192 * 36, 2 * read, 2 * written)


def test_attention_by_cudnn():
    """2 x 4 heads, 16 queries over 32 keys of size 8: two products forward, five backward."""
    forward, backward = hlo.kernels(ATTENTION)
    queries, keys, sums, product = 2 * 16 * 4 * 8, 2 * 32 * 4 * 8, 2 * 4 * 16, 2 * 4 * 16 * 32 * 8
    assert forward.kind == backward.kind == hlo.ATTENTION
    assert moved(forward) == (2 * 2 * product, 2 * (queries + 2 * keys), 2 * queries + 4 * sums)
    assert moved(backward) == (5 * 2 * product, 2 * (3 * queries + 2 * keys) + 4 * sums, 2 * (queries + 2 * keys))
    found = roofline.analyse(ATTENTION, roofline.RATES["NVIDIA H200"])
    assert found["attention"] == {"forward": 1, "backward": 1}


def test_a_loop_its_slices_and_its_updates():
    """Six turns: of the stack a sixth is read in each, and of the other a sixth is written."""
    zeros, convert, gemm, keep = hlo.kernels(SCAN)
    assert [k.times for k in (zeros, convert, gemm, keep)] == [1, 6, 6, 6]
    assert [k.kind for k in (zeros, convert, gemm, keep)] == [hlo.OTHER, hlo.OTHER, hlo.PRODUCT, hlo.STACK]
    assert moved(zeros) == (0, 2, 2 * 6 * 16 * 32)
    assert moved(convert) == (0, 4 * 64 * 32 + 4, 2 * 64 * 32)
    assert moved(gemm) == (2 * 16 * 64 * 32, 2 * (16 * 64 + 64 * 32), 2 * 16 * 32)
    assert moved(keep) == (0, 2 * 16 * 32 + 4, 2 * 16 * 32)
    assert hlo.unknown_loops(SCAN) == 0
    unknown = SCAN.replace("known_trip_count", "other")
    assert hlo.unknown_loops(unknown) == 1 and [k.times for k in hlo.kernels(unknown)] == [1, 1, 1, 1]


def test_an_update_that_runs_beside_others():
    update = "%keep_fusion = bf16[6,16,32]{2,1,0} fusion(%kept, %i, %gemm_fusion), kind=kLoop, calls=%keep"
    begun = "%begun = ((bf16[6,16,32], s32[], bf16[16,32]), bf16[6,16,32], u32[]) fusion-start(%kept, %i, %gemm_fusion)"
    done = "%keep_fusion = bf16[6,16,32]{2,1,0} fusion-done(%begun)"
    text = SCAN.replace(update, f"{begun}, kind=kLoop, calls=%keep\n  {done}")
    *_, keep = hlo.kernels(text)
    assert (keep.name, keep.opcode, keep.kind, keep.times) == ("begun", "fusion", hlo.STACK, 6)
    assert moved(keep) == (0, 2 * 16 * 32 + 4, 2 * 16 * 32)


def test_a_copy_out_of_a_stack():
    kernel = only("""
%fused (stack: bf16[6,16,32], i: s32[]) -> bf16[16,32] {
  %stack = bf16[6,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,16,32]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,16,32}
  ROOT %row = bf16[16,32]{1,0} bitcast(%slice)
}

ENTRY %main (stack: bf16[6,16,32], i: s32[]) -> bf16[16,32] {
  %stack = bf16[6,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %copy = bf16[16,32]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused
}
""")
    assert kernel.kind == hlo.STACK and moved(kernel) == (0, 2 * 16 * 32 + 4, 2 * 16 * 32)


def test_a_fusion_reads_what_its_results_ask_for():
    """Of x a slice of a sum with b, twice: b whole, a quarter of x; a parameter with two users is read once."""
    kernel = only("""
%fused (x: f32[8,64], b: f32[64], y: bf16[8,16]) -> (f32[8,16], bf16[8,16]) {
  %x = f32[8,64]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %wide = f32[8,64]{1,0} broadcast(%b), dimensions={1}
  %sum = f32[8,64]{1,0} add(%x, %wide)
  %part = f32[8,16]{1,0} slice(%sum), slice={[0:8], [16:32]}
  %y = bf16[8,16]{1,0} parameter(2)
  %y32 = f32[8,16]{1,0} convert(%y)
  %result = f32[8,16]{1,0} multiply(%part, %y32)
  %square = bf16[8,16]{1,0} multiply(%y, %y)
  ROOT %both = (f32[8,16]{1,0}, bf16[8,16]{1,0}) tuple(%result, %square)
}

ENTRY %main (x: f32[8,64], b: f32[64], y: bf16[8,16]) -> (f32[8,16], bf16[8,16]) {
  %x = f32[8,64]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %y = bf16[8,16]{1,0} parameter(2)
  ROOT %fusion = (f32[8,16]{1,0}, bf16[8,16]{1,0}) fusion(%x, %b, %y), kind=kLoop, calls=%fused
}
""")
    assert kernel.kind == hlo.OTHER
    assert moved(kernel) == (0, 4 * (8 * 16 + 64) + 2 * 8 * 16, (4 + 2) * 8 * 16)


def test_what_runs_beside_and_between_devices_counts_once():
    gathered, copied = hlo.kernels("""
ENTRY %main (a: f32[4,8]) -> f32[32,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %begin = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), channel_id=1, dimensions={0}
  %end = f32[32,8]{1,0} all-gather-done(%begin)
  %copy-start = (f32[32,8]{0,1}, f32[32,8]{1,0}, u32[]) copy-start(%end)
  ROOT %copy-done = f32[32,8]{0,1} copy-done(%copy-start)
}
""")
    assert gathered.kind == hlo.COLLECTIVE and gathered.opcode == "all-gather"
    assert moved(gathered) == (0, 4 * 32, 4 * 256) and moved(copied) == (0, 4 * 256, 4 * 256)


def test_the_costliest_branch_counts():
    branch = "\n%{0} (x: f32[{1}]) -> f32[{1}] {{\n  %x = f32[{1}] parameter(0)\n  ROOT %y = f32[{1}] negate(%x)\n}}\n"
    text = branch.format("small", 8) + branch.format("large", 80)
    text += """
ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %x = f32[8] parameter(1)
  ROOT %y = f32[8] conditional(%i, %x, %x), branch_computations={%large, %small}
}
"""
    assert moved(only(text)) == (0, 320, 320)


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.kernels("module @jit_f {\n}\n")


def test_a_kernel_takes_the_longer_of_its_two_times():
    rates = roofline.Rates(products=1e6, bandwidth=2e5)
    _, convert, gemm, keep = hlo.kernels(SCAN)
    assert rates.seconds(gemm) == pytest.approx(6 * 65536 / 1e6)
    assert rates.seconds(convert) == pytest.approx(6 * (8192 + 4 + 4096) / 2e5)
    found = roofline.analyse(SCAN, rates)
    assert list(found["categories"]) == [
        "elementwise, reductions",
        "bf16 products",
        "copies into and out of stacks",
    ]
    assert found["categories"]["copies into and out of stacks"]["seconds"] == pytest.approx(rates.seconds(keep))
    assert found["total"]["seconds"] == pytest.approx(sum(row["seconds"] for row in found["categories"].values()))
    assert found["total"]["launches"] == 19 and found["total"]["flops"] == 6 * 65536


def test_kernels_that_differ_in_their_layer_alone_are_listed_as_one():
    rates = roofline.RATES["NVIDIA H200"]
    kernels = roofline.analyse(ATTENTION, rates)["kernels"]
    layers = [{**kernel, "op_name": f"block_{i}/{kernel['op_name']}"} for kernel in kernels for i in range(3)]
    first, second = roofline.alike([*layers, {**layers[0], "read": 0}])[:2]
    assert first["times"] == 3 and first["seconds"] == pytest.approx(3 * kernels[0]["seconds"])
    assert len(roofline.alike([*layers, {**layers[0], "read": 0}])) == 3 and second["times"] == 3


def test_the_command_on_a_saved_program(tmp_path, capsys):
    program, out = tmp_path / "scan.hlo", tmp_path / "scan.json"
    program.write_text(SCAN)
    roofline.main(["--from", str(program), "--top", "2", "--rate", "100", "--bandwidth", "2", "--out", str(out)])
    message = capsys.readouterr().out
    assert "kernels: 4 in the program, launched 19 times" in message and "at 100 TFLOP/s" in message
    assert "keep_fusion" not in message and "convert_fusion" in message
    found = json.loads(out.read_text())
    assert found["rates"] == {"products": 1e14, "bandwidth": 2e12} and len(found["kernels"]) == 4


@pytest.mark.parametrize("arguments", [[], ["prior-1b", "--from", "x.hlo"], ["tiny-prior", "--set", "no_field=1"]])
def test_orders_that_cannot_be_followed(arguments, capsys):
    with pytest.raises(SystemExit):
        roofline.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_program_that_xla_refuses(monkeypatch, capsys):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes for %dot.1\nand more")

    monkeypatch.setattr(roofline, "topology_mesh", lambda name, sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(roofline, "compile_case", refuse)
    with pytest.raises(SystemExit):
        roofline.main(["tiny-prior", "--rate", "1", "--bandwidth", "1"])
    message = capsys.readouterr().err
    assert "triton_gemm=false" in message and "%dot.1" in message and "and more" not in message


def test_fields_of_a_case():
    case = roofline.changed_case("decoder-1b", "batch=8,multipliers=(1, 2)")
    assert case["batch"] == 8 and case["multipliers"] == (1, 2) and case["channels"] == 320
    for wrong in ("batch", "8", "batch=x", "batch=1)(", "batch=1)+(2", "depth_of=3"):
        with pytest.raises(ValueError):
            roofline.changed_case("decoder-1b", wrong)


def test_the_rates_of_a_device():
    known = roofline.chosen_rates("NVIDIA H200")
    assert (known.products, known.bandwidth) == pytest.approx((790e12, 4.3e12))
    assert roofline.chosen_rates("NVIDIA H200", bandwidth=2) == roofline.Rates(known.products, 2e12)
    with pytest.raises(ValueError, match="--rate"):
        roofline.chosen_rates("cpu", products=1)


def test_a_step_is_compiled_and_read():
    """For this CPU, whose programs are written alike: the products of the text are those of the trace."""
    mesh = make_mesh(devices=jax.devices()[:1])
    case = roofline.changed_case("tiny-prior", "width=32")
    found, text = roofline.compile_case(case, "forward", "float32", mesh)
    analysed = roofline.analyse(text, roofline.RATES["NVIDIA H200"])
    assert analysed["total"]["flops"] == pytest.approx(found["flops"], rel=0.01) and found["flops"] > 0
    names = {"case": "tiny-prior", "step": "forward", "dtype": "float32", "batch": 2}
    message = roofline.page(names | found | analysed, top=1)
    assert f"parameters: {found['parameters']:,}" in message and "memory of a device, GiB: arguments" in message
    assert found["memory"]["peak"] > 0


@pytest.mark.parametrize("measure", ["train_step", "full_step"])
def test_a_training_step_is_traced(measure):
    mesh = make_mesh(devices=jax.devices()[:1])
    traced, parameters = roofline.trace_step(roofline.CASES["tiny-prior"], measure, "bfloat16", mesh)
    assert parameters > 0 and count_flops(traced.jaxpr) > 0
    with pytest.raises(ValueError, match="generation"):
        roofline.trace_step(roofline.CASES["tiny-generate"], measure, "bfloat16", mesh)
