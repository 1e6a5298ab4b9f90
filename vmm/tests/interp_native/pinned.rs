//! Differences once found, cut down: the interpreter was wrong in each.

use super::case::{Case, Start};
use super::layout::*;
use super::segments::{Entry, Ldt, PLAIN_CODE, local};

use umbra::cpu::{Seg, eflags};

/// Local descriptors of these cases: 32-bit code that ends before [`BEYOND`], code that cannot be read, 16-bit code.
const SHORT_CODE: usize = 0;
const EXECUTE_ONLY: usize = 1;
const SMALL_CODE: usize = 2;
/// Behind the limit of [`SHORT_CODE`].
const BEYOND: u32 = 0x1000;

/// The data's pages: two writable, one read-only, then none.
const READ_ONLY: u32 = DATA_READ_ONLY;
const ABSENT: u32 = DATA + DATA_SIZE as u32;
const STACK: u32 = DATA + 0x1000;

/// One case: flat segments but for CS, ESP at [`STACK`], the other registers zero unless said.
pub struct Pinned {
    pub what: &'static str,
    pub code: Vec<u8>,
    gpr: Vec<(usize, u32)>,
    flags: u32,
    /// A local code segment; None is the flat one.
    cs: Option<usize>,
    /// How it must end: vector and error code.
    pub ends: (u32, u32),
}

fn pinned(what: &'static str, code: &[&[u8]], ends: (u32, u32)) -> Pinned {
    Pinned { what, code: code.concat(), gpr: Vec::new(), flags: 0, cs: None, ends }
}

impl Pinned {
    fn with(mut self, register: usize, value: u32) -> Pinned {
        self.gpr.push((register, value));
        self
    }

    fn flags(self, flags: u32) -> Pinned {
        Pinned { flags, ..self }
    }

    fn cs(self, entry: usize) -> Pinned {
        Pinned { cs: Some(entry), ..self }
    }

    pub fn case(&self) -> Case {
        let (base, cs) = self.cs.map_or((0, USER32_CODE), |entry| (CODE, local(entry)));
        let mut selectors = [USER_DATA; 6];
        selectors[Seg::Cs as usize] = cs;
        let mut gpr = [0; 8];
        gpr[4] = STACK;
        for (register, value) in &self.gpr {
            gpr[*register] = *value;
        }
        Case {
            start: Start { gpr, eip: CODE - base, selectors, flags: self.flags },
            at: 0,
            code: self.code.clone(),
            memory_seed: 1,
            pokes: Vec::new(),
        }
    }
}

pub fn descriptors() -> Ldt {
    let code = Entry { base: CODE, limit: 0xfff, contents: PLAIN_CODE, wide: true, ..Entry::default() };
    let mut entries = [code; LDT_ENTRIES];
    entries[EXECUTE_ONLY].restricted = true;
    entries[SMALL_CODE].wide = false;
    Ldt(entries)
}

/// PUSH imm32.
fn push(value: u32) -> [u8; 5] {
    let [a, b, c, d] = value.to_le_bytes();
    [0x68, a, b, c, d]
}

/// A far pointer 32 bits wide.
fn far(offset: u32, selector: u16) -> [u8; 6] {
    let ([a, b, c, d], [e, f]) = (offset.to_le_bytes(), selector.to_le_bytes());
    [a, b, c, d, e, f]
}

pub fn all() -> Vec<Pinned> {
    [strings(), transfers(), frames(), descriptor_looks()].into_iter().flatten().collect()
}

fn strings() -> Vec<Pinned> {
    vec![
        pinned("a fault in REPNE SCASB keeps the last iteration's flags", &[&[0xf2, 0xae]], (14, 4))
            .with(1, 9)
            .with(7, ABSENT - 3)
            .flags(eflags::ZF),
        pinned("a fault in REPE CMPSD keeps the last iteration's flags", &[&[0xf3, 0xa7]], (14, 4))
            .with(1, 9)
            .with(6, ABSENT - 8)
            .with(7, ABSENT - 8)
            .flags(eflags::SF),
        // push flags with TF; popfd; rep lodsb
        pinned(
            "single step between iterations saves no RF",
            &[&push(eflags::TF | 2), &[0x9d, 0xf3, 0xac]],
            (1, 0),
        )
        .with(1, 9)
        .with(6, DATA),
    ]
}

fn transfers() -> Vec<Pinned> {
    let beyond = (BEYOND - 5).to_le_bytes();
    let far_beyond = far(BEYOND, local(SHORT_CODE));
    vec![
        pinned("CALL: the push before the target", &[&[0xe8], &beyond], (14, 6)).with(4, DATA).cs(SHORT_CODE),
        pinned("CALL: the push's alignment before the target", &[&[0xe8], &beyond], (17, 0))
            .with(4, STACK + 1)
            .flags(eflags::AC)
            .cs(SHORT_CODE),
        pinned("CALL r/m: the push before the target", &[&[0xff, 0xd0]], (14, 7))
            .with(0, BEYOND)
            .with(4, READ_ONLY + 8)
            .cs(SHORT_CODE),
        pinned("CALL far: the push before the target", &[&[0x9a], &far_beyond], (14, 6)).with(4, DATA),
        pinned("CALL far: the target", &[&[0x9a], &far_beyond], (13, 0)),
        pinned("CALL far to 16-bit code: the target", &[&[0x9a], &far(BEYOND, local(SMALL_CODE))], (13, 0)),
        pinned("RETF reads CS first", &[&[0xcb]], (14, 4)).with(4, ABSENT - 1),
        pinned("IRET reads the flags first", &[&[0xcf]], (14, 4)).with(4, ABSENT - 1),
        pinned("IRET of 16 bits reads the flags first", &[&[0x66, 0xcf]], (14, 4)).with(4, ABSENT - 1),
        // push 0x28; push 0; retf 0x2000
        pinned(
            "RETF to another ring reads the outer stack first",
            &[&push(0x28), &push(0), &[0xca, 0, 0x20]],
            (14, 4),
        ),
        // pushes of a frame with RF, to the INT3 behind IRET
        pinned(
            "INT3 saves no RF",
            &[&push(eflags::RF | 2), &push(USER32_CODE.into()), &push(CODE + 16), &[0xcf]],
            (3, 0),
        ),
    ]
}

fn frames() -> Vec<Pinned> {
    let enter = |room: u8, level: u8| [0xc8, room, 0, level];
    vec![
        pinned("ENTER reads a frame pointer before it pushes it", &[&enter(0, 3)], (14, 4))
            .with(4, DATA + 8)
            .with(5, DATA + 2),
        pinned("ENTER pushes before it reads the next frame pointer", &[&enter(0, 3)], (14, 6))
            .with(4, DATA + 4)
            .with(5, DATA + 7),
        pinned("ENTER checks its room's alignment", &[&enter(1, 0)], (17, 0)).flags(eflags::AC),
        pinned("ENTER checks its room's alignment before its page", &[&[0xc8, 1, 0x20, 0]], (17, 0))
            .flags(eflags::AC),
    ]
}

fn descriptor_looks() -> Vec<Pinned> {
    let arpl = [0x63, 0x08];
    vec![
        pinned("ARPL reads before it writes", &[&arpl], (14, 4)).with(0, ABSENT).with(1, 3),
        // The seed's byte there has both low bits clear or not: against RPL 0 nothing is raised.
        pinned("ARPL writes nothing where nothing is raised", &[&arpl], (3, 0)).with(0, READ_ONLY).with(1, 0),
        pinned("ARPL of code that can be read", &[&[0x2e], &arpl], (3, 0)).with(0, CODE).with(1, 0),
        pinned("ARPL of a register keeps its upper half", &[&[0x63, 0xc8]], (3, 0))
            .with(0, 0xaaaa_0010)
            .with(1, 2),
        pinned("LAR shows the limit's top", &[&[0x0f, 0x02, 0xc1]], (3, 0)).with(1, USER_DATA.into()),
        pinned("CLFLUSH of code that cannot be read", &[&[0x2e, 0x0f, 0xae, 0x38]], (3, 0)).cs(EXECUTE_ONLY),
        pinned("CLFLUSH of nothing", &[&[0x0f, 0xae, 0x38]], (14, 4)).with(0, ABSENT).cs(EXECUTE_ONLY),
    ]
}
