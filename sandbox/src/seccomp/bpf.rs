//! Classic BPF, as much of it as a filter of system calls needs, and rules turned into it.
//!
//! Source: linux/filter.h, linux/bpf_common.h; struct seccomp_data in linux/seccomp.h.

use super::profile::Operator;

/// struct sock_filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

pub(super) const LOAD: u16 = 0x20;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQ: u16 = 0x15;
pub(super) const JUMP_GT: u16 = 0x25;
pub(super) const JUMP_GE: u16 = 0x35;
pub(super) const AND: u16 = 0x54;
pub(super) const RETURN: u16 = 0x06;

/// Offsets in struct seccomp_data.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCH: u32 = 4;

/// The halves of an argument on a little-endian machine, which all of [`super::Arch`] are.
pub(super) const fn low(index: u32) -> u32 {
    16 + 8 * index
}
pub(super) const fn high(index: u32) -> u32 {
    low(index) + 4
}

fn op(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// A comparison of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Comparison {
    pub index: u32,
    pub operator: Operator,
    pub value: u64,
    pub value_two: u64,
    /// Compare all 64 bits, else the lower 32.
    pub wide: bool,
}

/// Comparisons that must all hold, and what is then returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub comparisons: Vec<Comparison>,
    pub result: u32,
}

/// What a run of numbers leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Return(u32),
    /// The first rule that holds decides, else the last field does.
    Check(Vec<Rule>, u32),
}

/// Finds the segment of the number in the accumulator by halving. `segments` are the first
/// number and what it leads to, ascending from 0, and not empty.
pub(super) fn tree(segments: &[(u32, Outcome)]) -> Vec<Instruction> {
    match segments {
        [] => Vec::new(),
        [(_, outcome)] => leaf(outcome),
        _ => {
            let (below, above) = segments.split_at(segments.len() / 2);
            let (left, right) = (tree(below), tree(above));
            let mut code = branch(JUMP_GE, above[0].0, left.len());
            code.extend(left);
            code.extend(right);
            code
        }
    }
}

/// The code for one architecture, entered when `audit` is its number, else jumped over.
pub(super) fn block(audit: u32, body: Vec<Instruction>) -> Vec<Instruction> {
    let mut code = match u8::try_from(body.len()) {
        Ok(over) => vec![Instruction {
            code: JUMP_EQ,
            jt: 0,
            jf: over,
            k: audit,
        }],
        Err(_) => vec![
            Instruction {
                code: JUMP_EQ,
                jt: 1,
                jf: 0,
                k: audit,
            },
            op(JUMP, length(body.len())),
        ],
    };
    code.extend(body);
    code
}

pub(super) fn load(offset: u32) -> Instruction {
    op(LOAD, offset)
}

pub(super) fn ret(value: u32) -> Instruction {
    op(RETURN, value)
}

/// Goes on if the test fails, jumps over `distance` instructions if it holds.
fn branch(code: u16, k: u32, distance: usize) -> Vec<Instruction> {
    match u8::try_from(distance) {
        Ok(jt) => vec![Instruction { code, jt, jf: 0, k }],
        // Conditional jumps reach 255 far.
        Err(_) => vec![
            Instruction {
                code,
                jt: 0,
                jf: 1,
                k,
            },
            op(JUMP, length(distance)),
        ],
    }
}

/// Programs are cut off at 4096 instructions by the caller; a longer one only has to be seen.
fn length(distance: usize) -> u32 {
    u32::try_from(distance).unwrap_or(u32::MAX)
}

fn leaf(outcome: &Outcome) -> Vec<Instruction> {
    match outcome {
        Outcome::Return(value) => vec![ret(*value)],
        Outcome::Check(rules, otherwise) => {
            let mut code: Vec<Instruction> = rules.iter().flat_map(check).collect();
            code.push(ret(*otherwise));
            code
        }
    }
}

/// Returns the rule's result if it holds, else runs on behind it. At most six arguments of six
/// instructions each: every jump is short.
fn check(rule: &Rule) -> Vec<Instruction> {
    let mut code = vec![ret(rule.result)];
    for comparison in rule.comparisons.iter().rev() {
        // From the first instruction of what follows to behind the rule.
        let fail = code.len();
        let mut steps = compare(comparison, fail);
        steps.append(&mut code);
        code = steps;
    }
    code
}

/// Runs on if it holds; if not, jumps `fail` behind its own end.
fn compare(comparison: &Comparison, fail: usize) -> Vec<Instruction> {
    use Operator::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, MaskedEqual, NotEqual};
    enum To {
        Next,
        Pass,
        Fail,
    }
    let Comparison {
        index,
        operator,
        value,
        value_two,
        wide,
    } = *comparison;
    let [value_high, mask_or_value_two_high] = [value, value_two].map(|v| (v >> 32) as u32);
    let [value_low, value_two_low] = [value, value_two].map(|v| (v & 0xffff_ffff) as u32);
    // (code, k, then, else); jumps are resolved once the length is known.
    let mut steps: Vec<(u16, u32, To, To)> = Vec::new();
    let load = |offset| (LOAD, offset, To::Next, To::Next);
    if wide {
        steps.push(load(high(index)));
        match operator {
            Equal => steps.push((JUMP_EQ, value_high, To::Next, To::Fail)),
            NotEqual => steps.push((JUMP_EQ, value_high, To::Next, To::Pass)),
            Greater | GreaterOrEqual => {
                steps.push((JUMP_GT, value_high, To::Pass, To::Next));
                steps.push((JUMP_EQ, value_high, To::Next, To::Fail));
            }
            Less | LessOrEqual => {
                steps.push((JUMP_GT, value_high, To::Fail, To::Next));
                steps.push((JUMP_EQ, value_high, To::Next, To::Pass));
            }
            MaskedEqual => {
                steps.push((AND, value_high, To::Next, To::Next));
                steps.push((JUMP_EQ, mask_or_value_two_high, To::Next, To::Fail));
            }
        }
    }
    steps.push(load(low(index)));
    match operator {
        Equal => steps.push((JUMP_EQ, value_low, To::Next, To::Fail)),
        NotEqual => steps.push((JUMP_EQ, value_low, To::Fail, To::Next)),
        Greater => steps.push((JUMP_GT, value_low, To::Next, To::Fail)),
        GreaterOrEqual => steps.push((JUMP_GE, value_low, To::Next, To::Fail)),
        Less => steps.push((JUMP_GE, value_low, To::Fail, To::Next)),
        LessOrEqual => steps.push((JUMP_GT, value_low, To::Fail, To::Next)),
        MaskedEqual => {
            steps.push((AND, value_low, To::Next, To::Next));
            steps.push((JUMP_EQ, value_two_low, To::Next, To::Fail));
        }
    }
    let count = steps.len();
    steps
        .into_iter()
        .enumerate()
        .map(|(at, (code, k, then, otherwise))| {
            let behind = count - at - 1;
            let distance = |to: To| match to {
                To::Next => 0,
                To::Pass => short(behind),
                To::Fail => short(behind + fail),
            };
            Instruction {
                code,
                jt: distance(then),
                jf: distance(otherwise),
                k,
            }
        })
        .collect()
}

/// Within a rule there are at most 37 instructions, see [`check`].
fn short(distance: usize) -> u8 {
    u8::try_from(distance).expect("a rule has at most six comparisons")
}
