//! The attacks: for each door, raw code that goes through it where it stands open.
//!
//! Most end in 64-bit code, which is where the firmware's half of the address space can be named, or in an `out` at
//! CPL 0, which the VMM sees as I/O that no guest at CPL 3 could do.

use std::time::Duration;

use libtest_mimic::Trial;
use umbra::cpu::eflags;
use umbra::kvm::{Doors, Features, Host, KvmError, KvmExit, OpenDoors, Options, Stop};
use umbra::probe::scratch::{CODE, GDT, Scratch};
use umbra::probe::watchdog::Watchdog;
use umbra_firmware::ImageDoors;
use umbra_firmware::blob;
use umbra_firmware::constants::{CODE_SELECTOR, UPPER_BASE};
use umbra_mmu::Gva;

use crate::{ignored, trial};

/// One attack.
pub struct Attack {
    /// The door's name.
    name: &'static str,
    /// Doors open both times: others that stand in the way.
    beside: OpenDoors,
    /// The door itself, opened.
    open: fn(&mut OpenDoors),
    /// What the host must have for the door to be closable.
    needs: fn(&Features) -> Result<(), &'static str>,
    /// Sets up memory, descriptors and state, and gives the code.
    prepare: fn(&mut Scratch) -> Result<Vec<u8>, KvmError>,
    /// True where the result is what a closed door must give.
    repelled: fn(&Outcome) -> bool,
    /// True where the attack succeeded.
    succeeded: fn(&Outcome) -> bool,
    /// Why the attack cannot succeed on this host even with the door open.
    impossible: fn(&Outcome) -> Option<&'static str>,
}

/// What came of an attack.
#[derive(Debug)]
struct Outcome {
    exit: Result<KvmExit, KvmError>,
    eip: u32,
    data: u64,
}

impl Outcome {
    fn trapped(&self, vector: u8, error: u32) -> bool {
        matches!(self.exit, Ok(KvmExit::Trap { vector: v, error: e, .. }) if (v, e) == (vector, error))
    }

    /// A far transfer to a descriptor that is hidden: #GP with its selector, or what an emulator makes of it.
    fn hidden(&self, selector: u32) -> bool {
        self.trapped(13, selector) && self.eip == CODE.0 && self.data == 0 || self.undefined()
    }

    fn undefined(&self) -> bool {
        self.trapped(6, 0) && self.eip == CODE.0 && self.data == 0
    }

    fn stopped(&self) -> Option<&Stop> {
        match &self.exit {
            Err(KvmError::Stopped { why, .. }) => Some(why),
            _ => None,
        }
    }

    fn did_io(&self, port: u16) -> bool {
        self.stopped() == Some(&Stop::GuestIo { port, write: true })
    }

    fn stopped_at_cpl_0(&self) -> bool {
        matches!(&self.exit, Err(KvmError::Stopped { dump, .. }) if dump.sregs.cs.selector == CODE_SELECTOR)
    }

    fn ran_64_bit_code(&self) -> bool {
        self.data as u32 == MARK
    }
}

const CLOSED: OpenDoors = OpenDoors {
    reset_ldt: false,
    long_code: false,
    system_descriptors: false,
    iopl: false,
    sysenter: None,
    syscall: None,
    no_smep: false,
    no_smap: false,
    no_umip: false,
    native_cpuid: false,
    native_tsc: false,
    image: ImageDoors { user_pages: false, user_code_selector: false, io_map: false },
};

/// An attack with nothing special about it.
const PLAIN: Attack = Attack {
    name: "",
    beside: CLOSED,
    open: |_| {},
    needs: |_| Ok(()),
    prepare: |_| Ok(vec![]),
    repelled: |_| false,
    succeeded: |_| false,
    impossible: |_| None,
};

/// Every door.
pub const ATTACKS: &[Attack] = &[
    Attack {
        name: "reset_ldt",
        beside: OpenDoors { no_smap: true, ..CLOSED },
        open: |doors| doors.reset_ldt = true,
        prepare: forge_ldt,
        repelled: |outcome| outcome.trapped(13, 0x0c) && outcome.data == 0,
        succeeded: Outcome::ran_64_bit_code,
        ..PLAIN
    },
    Attack {
        name: "smap",
        beside: OpenDoors { reset_ldt: true, ..CLOSED },
        open: |doors| doors.no_smap = true,
        needs: |features| if features.smap { Ok(()) } else { Err("this KVM has no SMAP") },
        prepare: forge_ldt,
        repelled: |outcome| outcome.trapped(14, 1) && outcome.data == 0,
        succeeded: Outcome::ran_64_bit_code,
        ..PLAIN
    },
    Attack {
        name: "long_code_in_user_mode",
        open: |doors| doors.long_code = true,
        prepare: |scratch| {
            with_descriptors(scratch, &[0x00af_fb00_0000_ffff])?;
            Ok(far_jump_to_64_bit_code(0x2b))
        },
        repelled: |outcome| outcome.hidden(0x28),
        succeeded: Outcome::ran_64_bit_code,
        ..PLAIN
    },
    Attack {
        name: "long_code_in_kernel_mode",
        open: |doors| doors.long_code = true,
        prepare: |scratch| {
            scratch.load(&[], false)?;
            with_descriptors(scratch, &[0x00af_9b00_0000_ffff])?;
            Ok(far_jump_to_64_bit_code(0x28))
        },
        repelled: |outcome| outcome.hidden(0x28),
        succeeded: Outcome::ran_64_bit_code,
        ..PLAIN
    },
    Attack {
        name: "call_gate",
        beside: OpenDoors { no_smep: true, ..CLOSED },
        open: |doors| doors.system_descriptors = true,
        prepare: call_gate,
        repelled: |outcome| outcome.hidden(0x28),
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        impossible: no_call_gates,
        ..PLAIN
    },
    Attack {
        name: "smep_by_call_gate",
        beside: OpenDoors { system_descriptors: true, ..CLOSED },
        open: |doors| doors.no_smep = true,
        needs: |features| if features.smep { Ok(()) } else { Err("this KVM has no SMEP") },
        prepare: call_gate,
        repelled: |outcome| fetch_was_refused(outcome) || no_call_gates(outcome).is_some(),
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        impossible: no_call_gates,
    },
    Attack {
        name: "syscall",
        beside: OpenDoors { no_smep: true, ..CLOSED },
        open: |doors| doors.syscall = Some(TO_PAGE_0),
        prepare: |scratch| code_at_cpl_0(scratch, &[0x0f, 0x05]),
        repelled: Outcome::undefined,
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        impossible: |outcome| outcome.undefined().then_some("SYSCALL from compatibility mode is AMD's alone"),
        ..PLAIN
    },
    Attack {
        name: "smep_by_syscall",
        beside: OpenDoors { syscall: Some(TO_PAGE_0), ..CLOSED },
        open: |doors| doors.no_smep = true,
        needs: |features| if features.smep { Ok(()) } else { Err("this KVM has no SMEP") },
        prepare: |scratch| code_at_cpl_0(scratch, &[0x0f, 0x05]),
        repelled: |outcome| fetch_was_refused(outcome) || outcome.undefined(),
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        impossible: |outcome| outcome.undefined().then_some("SYSCALL from compatibility mode is AMD's alone"),
    },
    Attack {
        name: "sysenter",
        beside: OpenDoors { no_smep: true, ..CLOSED },
        open: |doors| doors.sysenter = Some([CODE_SELECTOR as u64, GATE_OFFSET as u64, 0]),
        prepare: |scratch| code_at_cpl_0(scratch, &[0x0f, 0x34]),
        repelled: |outcome| outcome.trapped(13, 0) || outcome.undefined(),
        // TCG under SVM gets there, with a CS that it then refuses itself.
        succeeded: |outcome| outcome.did_io(MARK_PORT) || outcome.stopped_at_cpl_0(),
        impossible: |outcome| outcome.undefined().then_some("SYSENTER in long mode is Intel's alone"),
        ..PLAIN
    },
    Attack {
        name: "iopl_cli",
        open: |doors| doors.iopl = true,
        prepare: |scratch| {
            scratch.cpu.eflags |= eflags::IOPL;
            Ok([&[0xfa], store_mark().as_slice(), &HLT].concat())
        },
        repelled: |outcome| outcome.trapped(13, 0) && outcome.eip == CODE.0,
        succeeded: |outcome| outcome.data as u32 == MARK,
        ..PLAIN
    },
    Attack {
        name: "iopl_out",
        open: |doors| doors.iopl = true,
        prepare: |scratch| {
            scratch.cpu.eflags |= eflags::IOPL;
            Ok(vec![0xe6, MARK_PORT as u8])
        },
        repelled: |outcome| outcome.trapped(13, 0),
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        ..PLAIN
    },
    Attack {
        name: "io_map",
        open: |doors| doors.image.io_map = true,
        prepare: |_| Ok(vec![0xe6, MARK_PORT as u8]),
        repelled: |outcome| outcome.trapped(13, 0),
        succeeded: |outcome| outcome.did_io(MARK_PORT),
        impossible: |outcome| {
            (under_tcg() && outcome.trapped(13, 0))
                .then_some("TCG under SVM does not read the I/O map of a busy TSS")
        },
        ..PLAIN
    },
    Attack {
        name: "firmware_code_selector",
        open: |doors| doors.image.user_code_selector = true,
        prepare: |_| Ok(far_jump_to_64_bit_code(CODE_SELECTOR | 3)),
        repelled: |outcome| outcome.trapped(13, CODE_SELECTOR.into()) && outcome.data == 0,
        succeeded: Outcome::ran_64_bit_code,
        ..PLAIN
    },
    Attack {
        name: "firmware_pages",
        // With U=1 the firmware's own accesses would meet SMAP and SMEP: these two close the door a second time.
        beside: OpenDoors { long_code: true, no_smap: true, no_smep: true, ..CLOSED },
        open: |doors| doors.image.user_pages = true,
        prepare: |scratch| {
            with_descriptors(scratch, &[0x00af_fb00_0000_ffff])?;
            Ok(far_jump(0x2b, &read_first_byte_of_firmware()))
        },
        repelled: |outcome| {
            // A KVM that keeps the upper half to itself may report more or less than P and U.
            const USER: u32 = 4;
            matches!(outcome.exit, Ok(KvmExit::Trap { vector: 14, error, cr2: UPPER_BASE })
                if error & USER != 0 && outcome.data == 0)
        },
        succeeded: |outcome| outcome.data.to_le_bytes() == blob::code()[..8],
        impossible: |outcome| {
            const PRESENT_USER: u32 = 5;
            matches!(outcome.exit, Ok(KvmExit::Trap { vector: 14, error, .. }) if error != PRESENT_USER)
                .then_some("this KVM keeps code at CPL 3 out of the upper half by itself")
        },
        ..PLAIN
    },
    Attack {
        name: "umip",
        open: |doors| doors.no_umip = true,
        needs: |features| if features.umip { Ok(()) } else { Err("this KVM has no UMIP") },
        prepare: |_| Ok(vec![0x0f, 0x01, 0x06, 0xf4]),
        repelled: |outcome| outcome.trapped(13, 0) && outcome.eip == CODE.0 && outcome.data == 0,
        succeeded: |outcome| outcome.data != 0,
        ..PLAIN
    },
    Attack {
        name: "cpuid",
        open: |doors| doors.native_cpuid = true,
        prepare: |_| Ok(vec![0x0f, 0xa2, 0x89, 0x1e, 0xf4]),
        repelled: |outcome| outcome.trapped(13, 0) && outcome.eip == CODE.0 && outcome.data == 0,
        succeeded: |outcome| outcome.data != 0,
        ..PLAIN
    },
    Attack {
        name: "rdtsc",
        open: |doors| doors.native_tsc = true,
        prepare: |_| Ok(vec![0x0f, 0x31, 0x89, 0x06, 0xf4]),
        repelled: |outcome| outcome.trapped(13, 0) && outcome.eip == CODE.0 && outcome.data == 0,
        succeeded: |outcome| outcome.data != 0,
        ..PLAIN
    },
];

/// The names of an attack's tests.
pub fn names(attack: &Attack) -> [String; 2] {
    ["closed", "opened"].map(|state| format!("door_{}_{state}", attack.name))
}

/// An attack's tests: the open variant runs here and now, since only then it is known whether it can succeed.
pub fn trials(host: &'static Host, attack: &'static Attack) -> [Trial; 2] {
    let [closed, opened] = names(attack);
    if let Err(reason) = usable(host, attack) {
        return [ignored(closed, &reason), ignored(opened, &reason)];
    }
    let mut doors = attack.beside;
    (attack.open)(&mut doors);
    let second = match run(host, attack, doors) {
        Ok(outcome) if !(attack.succeeded)(&outcome) && (attack.impossible)(&outcome).is_some() => {
            ignored(opened, (attack.impossible)(&outcome).unwrap_or_default())
        }
        Ok(outcome) => {
            let result = expect((attack.succeeded)(&outcome), "through the open door", &outcome);
            trial(opened, move || result)
        }
        Err(error) => trial(opened, move || Err(error.to_string())),
    };
    let first = trial(closed, move || {
        let outcome = run(host, attack, attack.beside).map_err(|error| error.to_string())?;
        expect((attack.repelled)(&outcome), "repelled by the closed door", &outcome)
    });
    [first, second]
}

fn expect(met: bool, what: &str, outcome: &Outcome) -> Result<(), String> {
    if met { Ok(()) } else { Err(format!("the attack was not {what}: {outcome:x?}")) }
}

fn usable(host: &Host, attack: &Attack) -> Result<(), String> {
    let scratch = Scratch::new(host, Options::default()).map_err(|error| error.to_string())?;
    (attack.needs)(&scratch.vcpu.features()).map_err(str::to_owned)
}

fn run(host: &Host, attack: &Attack, doors: OpenDoors) -> Result<Outcome, KvmError> {
    let mut scratch = Scratch::new(host, Options { doors: Doors::opened(doors), ..Options::default() })?;
    let code = (attack.prepare)(&mut scratch)?;
    scratch.space.pool().write(scratch.code.at(0), &code)?;
    let watchdog = Watchdog::new(Duration::from_secs(5));
    watchdog.watch(attack.name, scratch.vcpu.kicker());
    let exit = scratch.enter();
    Ok(Outcome { exit, eip: scratch.cpu.eip, data: scratch.data_word(0)? })
}

const HLT: [u8; 1] = [0xf4];

/// What successful code leaves in the data page.
const MARK: u32 = 0x1122_3344;

/// The port that successful code writes.
const MARK_PORT: u16 = 0x55;

/// IA32_STAR and IA32_CSTAR: to offset [`GATE_OFFSET`] at CPL 0.
const TO_PAGE_0: [u64; 2] = [(CODE_SELECTOR as u64) << 32, GATE_OFFSET as u64];

/// Where, in page 0, code at CPL 0 would run.
const GATE_OFFSET: u32 = 0x550;

fn with_descriptors(scratch: &mut Scratch, more: &[u64]) -> Result<(), KvmError> {
    scratch.set_gdt(&[&GDT, more].concat())
}

/// `mov dword [esi], MARK` in 32-bit code.
fn store_mark() -> Vec<u8> {
    [&[0xc7, 0x06][..], &MARK.to_le_bytes()].concat()
}

/// `mov rax, MARK:...; shr rax, 32; mov [rsi], eax; hlt`: in 32-bit code the same bytes leave another value.
fn mark_in_64_bit_code() -> Vec<u8> {
    let value = u64::from(MARK) << 32 | 0x5566_7788;
    [&[0x48, 0xb8][..], &value.to_le_bytes(), &[0x48, 0xc1, 0xe8, 0x20, 0x89, 0x06, 0xf4]].concat()
}

/// `mov rax, UPPER_BASE; mov rax, [rax]; mov [rsi], rax; hlt`.
fn read_first_byte_of_firmware() -> Vec<u8> {
    let base = UPPER_BASE.to_le_bytes();
    [&[0x48, 0xb8][..], &base, &[0x48, 0x8b, 0x00, 0x48, 0x89, 0x06, 0xf4]].concat()
}

/// `jmp selector:next; next: rest`, at the start of the code page.
fn far_jump(selector: u16, rest: &[u8]) -> Vec<u8> {
    const LENGTH: u32 = 7;
    let target = (CODE.0 + LENGTH).to_le_bytes();
    [&[0xea][..], &target, &selector.to_le_bytes(), rest].concat()
}

fn far_jump_to_64_bit_code(selector: u16) -> Vec<u8> {
    far_jump(selector, &mark_in_64_bit_code())
}

/// The reset LDT has base 0: a 64-bit code descriptor at linear 8 is its entry 1.
fn forge_ldt(scratch: &mut Scratch) -> Result<Vec<u8>, KvmError> {
    let page = scratch.space.page(Gva(0))?;
    scratch.space.pool().store(page.at(8), 0x00af_fb00_0000_ffff)?;
    Ok(far_jump_to_64_bit_code(0x0f))
}

/// A call gate with DPL 3 to page 0 at CPL 0, and the call through it.
fn call_gate(scratch: &mut Scratch) -> Result<Vec<u8>, KvmError> {
    let gate = u64::from(GATE_OFFSET) | u64::from(CODE_SELECTOR) << 16 | 0xec << 40;
    with_descriptors(scratch, &[gate, 0])?;
    code_at_cpl_0(scratch, &[0x9a, 0, 0, 0, 0, 0x2b, 0])
}

/// Code in page 0 that does what only CPL 0 may: `out MARK_PORT, al`.
fn code_at_cpl_0(scratch: &mut Scratch, attack: &[u8]) -> Result<Vec<u8>, KvmError> {
    let page = scratch.space.page(Gva(0))?;
    scratch.space.pool().write(page.at(GATE_OFFSET), &[0xe6, MARK_PORT as u8, 0xf4])?;
    Ok(attack.to_vec())
}

/// The fetch at CPL 0 faulted: in the firmware's eyes, or with nowhere to push the frame.
fn fetch_was_refused(outcome: &Outcome) -> bool {
    matches!(outcome.stopped(), Some(Stop::FirmwareFault { vector: 14, .. } | Stop::Shutdown))
}

fn no_call_gates(outcome: &Outcome) -> Option<&'static str> {
    outcome.undefined().then_some("this KVM emulates 32-bit code and knows no call gates")
}

/// True on a machine that QEMU emulates without KVM, such as the nested rig.
fn under_tcg() -> bool {
    const HYPERVISOR_LEAF: u32 = 0x4000_0000;
    let leaf = std::arch::x86_64::__cpuid(HYPERVISOR_LEAF);
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}
