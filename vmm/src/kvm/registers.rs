//! What the hardware runs with, from what the guest believes, and back.
//!
//! Story: at each entry every register of the vCPU is made from the [`CpuState`]; at each exit the state is made
//! from the registers. In between, the guest's kernel runs at CPL 3 like everything else, so that privilege levels,
//! IF and IOPL differ between the two.
//!
//! Holds:
//! - ENT-1: at guest entry CS has L=0, and CS, SS and every usable data segment have DPL 3; RPL of CS and SS is 3.
//! - ENT-2: IF=1, IOPL=0, VM=0 in the hardware's flags; EFER has no SCE.
//! - ENT-3: paging is long mode with WP, NXE, and SMEP, SMAP, UMIP as the host has them; PGE, PVI, VME, PCE and
//!   OSXSAVE are 0, whatever the guest has.
//! - ENT-4: the LDT is unusable unless the guest's is translated.
//!
//! Not here: entering, trap frames, and which descriptors the tables show.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use umbra_firmware::constants::{IDT, IDT_BYTES, UPPER_BASE};
use umbra_firmware::{Layout, VcpuLayout};
use umbra_mmu::Mpa;

use crate::cpu::{CpuState, Seg, Segment, cr0, cr4, efer, eflags};

use super::descriptors::Mode;
use super::doors::Doors;
use super::host::Features;

/// Flags that code at CPL 3 may really change; the others are the VMM's.
const NATIVE_FLAGS: u32 = eflags::CF
    | eflags::PF
    | eflags::AF
    | eflags::ZF
    | eflags::SF
    | eflags::TF
    | eflags::DF
    | eflags::OF
    | eflags::NT
    | eflags::RF
    | eflags::AC
    | eflags::ID;

const SEGMENTS: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];

/// Why the guest's state cannot run at CPL 3 in compatibility mode; the interpreter must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotRun {
    /// CR0.PE is 0.
    #[error("the CPU is in real mode")]
    RealMode,
    /// EFLAGS.VM is 1.
    #[error("the CPU is in virtual-8086 mode")]
    Virtual8086,
    /// Privilege levels 1 and 2 have no mode of their own.
    #[error("the CPU is at privilege level {0}")]
    PrivilegeLevel(u8),
    /// CS is not a usable code segment.
    #[error("CS cannot be loaded: {0:?}")]
    CodeSegment(Segment),
    /// SS is not a usable, writable data segment.
    #[error("SS cannot be loaded: {0:?}")]
    StackSegment(Segment),
}

/// Says whether `cpu` can run natively.
///
/// # Errors
/// The reason why not.
pub fn can_run(cpu: &CpuState) -> Result<(), CannotRun> {
    const CODE: u16 = 0x98;
    const WRITABLE: u16 = 0x92;
    let (cs, ss) = (cpu.segment(Seg::Cs), cpu.segment(Seg::Ss));
    if cpu.cr0 & cr0::PE == 0 {
        Err(CannotRun::RealMode)
    } else if cpu.eflags & eflags::VM != 0 {
        Err(CannotRun::Virtual8086)
    } else if !matches!(cpu.cpl, 0 | 3) {
        Err(CannotRun::PrivilegeLevel(cpu.cpl))
    } else if cs.unusable || cs.attributes & CODE != CODE {
        Err(CannotRun::CodeSegment(*cs))
    } else if ss.unusable || ss.attributes & (WRITABLE | 8) != WRITABLE {
        Err(CannotRun::StackSegment(*ss))
    } else {
        Ok(())
    }
}

/// What entries of one vCPU have in common.
#[derive(Clone, Debug)]
pub struct EntryPlan {
    /// The vCPU's index.
    pub index: u32,
    /// Where the firmware's image is.
    pub image: Mpa,
    /// The firmware's code selector.
    pub code_selector: u16,
    /// Limit of the task register.
    pub tss_limit: u32,
    /// Where the vCPU's tables are.
    pub layout: VcpuLayout,
    /// What the host's KVM offers.
    pub features: Features,
    /// Which doors stand open.
    pub doors: Doors,
    /// RDTSC traps in the guest's kernel too.
    pub trap_tsc: bool,
}

impl EntryPlan {
    /// The plan for vCPU `index` of `layout`, whose image is at `image`.
    pub fn new(
        layout: &Layout,
        image: Mpa,
        index: u32,
        features: Features,
        doors: Doors,
        trap_tsc: bool,
    ) -> EntryPlan {
        EntryPlan {
            index,
            image,
            code_selector: layout.code_selector(),
            tss_limit: layout.tss_limit(),
            layout: layout.vcpu(index),
            features,
            doors,
            trap_tsc,
        }
    }

    /// Fills `sregs` for the guest's `cpu` on the page tables at `root`; `ldt_limit` is that of a translated LDT.
    /// `sregs` keeps what is not named here (APIC base, CR8).
    pub fn guest_sregs(&self, cpu: &CpuState, root: Mpa, ldt_limit: Option<u32>, sregs: &mut kvm_sregs) {
        let mode = Mode::of_cpl(cpu.cpl);
        self.common_sregs(cpu, root, mode, sregs);
        for seg in SEGMENTS {
            *slot(sregs, seg) = to_hardware(cpu.segment(seg), matches!(seg, Seg::Cs | Seg::Ss));
        }
        sregs.ldt = self.ldt(cpu, mode, ldt_limit);
        sregs.tr.selector = cpu.tr.selector & !7;
    }

    /// Fills `regs` and `sregs` for the firmware's code at `offset` on the page tables at `root`.
    pub fn firmware(
        &self,
        offset: u64,
        cpu: &CpuState,
        root: Mpa,
        regs: &mut kvm_regs,
        sregs: &mut kvm_sregs,
    ) {
        *regs = kvm_regs {
            rip: UPPER_BASE + offset,
            rsp: UPPER_BASE + self.layout.stack_top(),
            rflags: u64::from(eflags::FIXED),
            ..kvm_regs::default()
        };
        self.common_sregs(cpu, root, Mode::of_cpl(cpu.cpl), sregs);
        for seg in SEGMENTS {
            *slot(sregs, seg) = UNUSABLE;
        }
        sregs.cs = kvm_segment { selector: self.code_selector, ..FIRMWARE_CODE };
        sregs.ss = FIRMWARE_STACK;
        sregs.ldt = UNUSABLE;
    }

    fn common_sregs(&self, cpu: &CpuState, root: Mpa, mode: Mode, sregs: &mut kvm_sregs) {
        let open = self.doors.open();
        sregs.tr = kvm_segment {
            base: UPPER_BASE + self.layout.tss(),
            limit: self.tss_limit,
            selector: 0,
            type_: 0xb,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.gdt = table(UPPER_BASE + self.layout.gdt(mode.user()), u16::MAX);
        sregs.idt = table(UPPER_BASE + IDT, (IDT_BYTES - 1) as u16);
        sregs.cr0 = u64::from(real_cr0(cpu));
        sregs.cr2 = 0;
        sregs.cr3 = root.0;
        sregs.cr4 = u64::from(self.real_cr4(cpu));
        let syscall = if open.syscall.is_some() { efer::SCE } else { 0 };
        sregs.efer = efer::LME | efer::LMA | efer::NXE | syscall;
        sregs.interrupt_bitmap = [0; 4];
    }

    /// CR4 as the hardware has it while the guest runs (ENT-3).
    fn real_cr4(&self, cpu: &CpuState) -> u32 {
        const GUESTS: u32 = cr4::DE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        let open = self.doors.open();
        let when = |condition: bool, bit: u32| if condition { bit } else { 0 };
        let tsd = cpu.cr4 & cr4::TSD != 0 && cpu.cpl == 3;
        cr4::PAE
            | cpu.cr4 & GUESTS
            | when((self.trap_tsc && !open.native_tsc) || tsd, cr4::TSD)
            | when(self.features.smep && !open.no_smep, cr4::SMEP)
            | when(self.features.smap && !open.no_smap, cr4::SMAP)
            | when(self.features.umip && !open.no_umip, cr4::UMIP)
    }

    fn ldt(&self, cpu: &CpuState, mode: Mode, limit: Option<u32>) -> kvm_segment {
        match limit {
            _ if self.doors.open().reset_ldt => {
                kvm_segment { limit: 0xffff, type_: 2, present: 1, ..kvm_segment::default() }
            }
            Some(limit) => kvm_segment {
                base: UPPER_BASE + self.layout.ldt(mode.user()),
                limit,
                selector: cpu.ldtr.selector & !7,
                type_: 2,
                present: 1,
                ..kvm_segment::default()
            },
            None => UNUSABLE,
        }
    }

    /// The hardware's flags for the guest's (ENT-2).
    pub fn flags_to_hardware(&self, guest: u32) -> u64 {
        let native = if self.doors.open().iopl { NATIVE_FLAGS | eflags::IOPL } else { NATIVE_FLAGS };
        u64::from(guest & native | eflags::FIXED | eflags::IF)
    }
}

/// The guest's flags from the hardware's: IF, IOPL, VM, VIF and VIP stay what they were in `guest`.
pub fn flags_from_hardware(hardware: u64, guest: u32) -> u32 {
    hardware as u32 & NATIVE_FLAGS | guest & !NATIVE_FLAGS | eflags::FIXED
}

/// CR0 as the hardware has it: the guest's TS, EM and MP as they are; alignment is checked in user mode alone,
/// since the guest's kernel runs at CPL 3 too.
fn real_cr0(cpu: &CpuState) -> u32 {
    let alignment = if cpu.cpl == 3 { cr0::AM } else { 0 };
    let guests = cpu.cr0 & (cr0::TS | cr0::EM | cr0::MP | alignment);
    cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | guests
}

/// Copies the general registers, EIP and flags into `regs`.
pub fn regs_to_hardware(plan: &EntryPlan, cpu: &CpuState, regs: &mut kvm_regs) {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi] = cpu.gpr.map(u64::from);
    *regs = kvm_regs {
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        rip: u64::from(cpu.eip),
        rflags: plan.flags_to_hardware(cpu.eflags),
        ..kvm_regs::default()
    };
}

/// The eight general registers, in the order of their encoding.
pub fn gprs_from_hardware(regs: &kvm_regs) -> [u32; 8] {
    [regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi].map(|reg| reg as u32)
}

/// The hardware's register for a guest's segment (ENT-1). `privileged` for CS and SS, whose RPL is the CPL.
pub fn to_hardware(segment: &Segment, privileged: bool) -> kvm_segment {
    if segment.unusable || segment.attributes & 0x80 == 0 {
        return kvm_segment { selector: segment.selector & 3, ..UNUSABLE };
    }
    let granular = segment.limit > 0xf_ffff;
    kvm_segment {
        base: u64::from(segment.base),
        limit: if granular { whole_pages(segment.limit) } else { segment.limit },
        selector: if privileged { segment.selector | 3 } else { segment.selector },
        type_: segment.kind() | 1,
        present: 1,
        dpl: 3,
        db: u8::from(segment.big()),
        s: 1,
        l: 0,
        g: u8::from(granular),
        avl: (segment.attributes >> 12) as u8 & 1,
        unusable: 0,
        padding: 0,
    }
}

/// A limit that G=1 can express, never above `limit`. Descriptors give no other; a made-up state might.
fn whole_pages(limit: u32) -> u32 {
    if limit & 0xfff == 0xfff { limit } else { (limit & !0xfff) - 1 }
}

/// True where the register still holds what was entered with: nothing loaded it, as far as anybody could tell.
pub fn unchanged(entered: &kvm_segment, now: &kvm_segment) -> bool {
    let unusable = |segment: &kvm_segment| segment.unusable != 0 || segment.present == 0;
    entered.selector == now.selector
        && unusable(entered) == unusable(now)
        && (unusable(now)
            || (entered.base == now.base
                && entered.limit == now.limit
                && entered.type_ | 1 == now.type_ | 1
                && entered.db == now.db))
}

/// The guest's view of a register that native code loaded, where its tables hold no descriptor for it (a null
/// selector), or null.
pub fn null_segment(selector: u16) -> Segment {
    Segment { selector, unusable: true, ..Segment::default() }
}

/// The register of `sregs` that `seg` names.
pub fn slot(sregs: &mut kvm_sregs, seg: Seg) -> &mut kvm_segment {
    match seg {
        Seg::Es => &mut sregs.es,
        Seg::Cs => &mut sregs.cs,
        Seg::Ss => &mut sregs.ss,
        Seg::Ds => &mut sregs.ds,
        Seg::Fs => &mut sregs.fs,
        Seg::Gs => &mut sregs.gs,
    }
}

fn table(base: u64, limit: u16) -> kvm_dtable {
    kvm_dtable { base, limit, padding: [0; 3] }
}

const UNUSABLE: kvm_segment = kvm_segment {
    base: 0,
    limit: 0,
    selector: 0,
    type_: 0,
    present: 0,
    dpl: 0,
    db: 0,
    s: 0,
    l: 0,
    g: 0,
    avl: 0,
    unusable: 1,
    padding: 0,
};

const FIRMWARE_CODE: kvm_segment =
    kvm_segment { limit: u32::MAX, type_: 0xb, present: 1, s: 1, l: 1, g: 1, unusable: 0, ..UNUSABLE };

const FIRMWARE_STACK: kvm_segment =
    kvm_segment { limit: u32::MAX, type_: 3, present: 1, db: 1, s: 1, g: 1, unusable: 0, ..UNUSABLE };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::doors::OpenDoors;

    fn plan(doors: Doors) -> EntryPlan {
        let features = Features { smep: true, smap: true, umip: true, ..Features::default() };
        EntryPlan::new(&Layout::new(2).unwrap(), Mpa(0), 1, features, doors, true)
    }

    fn entered(cpu: &CpuState, doors: Doors) -> kvm_sregs {
        let mut sregs = kvm_sregs { apic_base: 0x1234, ..kvm_sregs::default() };
        plan(doors).guest_sregs(cpu, Mpa(0x5000), None, &mut sregs);
        sregs
    }

    /// A guest's state with every bit set that it may set, and more.
    fn hostile(cpl: u8) -> CpuState {
        let mut cpu = CpuState::flat_protected_mode(0x1000);
        cpu.cpl = cpl;
        cpu.eflags = !eflags::VM;
        cpu.cr0 = u32::MAX;
        cpu.cr4 = u32::MAX;
        cpu.msrs.efer = u64::MAX;
        for segment in &mut cpu.seg {
            // L=1 and the DPL of the state's own making.
            segment.attributes |= 0x2000 | u16::from(cpl) << 5;
        }
        cpu
    }

    #[test]
    fn hostile_state_enters_with_every_door_closed() {
        for cpl in [0, 3] {
            let cpu = hostile(cpl);
            let sregs = entered(&cpu, Doors::closed());
            assert_eq!((sregs.cs.l, sregs.cs.dpl, sregs.cs.selector & 3), (0, 3, 3), "ENT-1");
            assert_eq!((sregs.ss.dpl, sregs.ss.selector & 3), (3, 3), "ENT-1");
            let data = [sregs.ds, sregs.es, sregs.fs, sregs.gs];
            assert!(data.iter().all(|seg| (seg.dpl, seg.l, seg.s) == (3, 0, 1)), "ENT-1");
            let flags = plan(Doors::closed()).flags_to_hardware(cpu.eflags) as u32;
            assert_eq!(flags & (eflags::IF | eflags::IOPL | eflags::VM), eflags::IF, "ENT-2");
            assert_eq!(sregs.efer, efer::LME | efer::LMA | efer::NXE, "ENT-2");
            let must = cr4::PAE | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::TSD;
            let may = must | cr4::DE | cr4::OSFXSR | cr4::OSXMMEXCPT;
            assert_eq!(sregs.cr4 as u32 & must, must, "ENT-3");
            assert_eq!(sregs.cr4 as u32 & !may, 0, "ENT-3");
            assert_eq!(sregs.cr0 as u32 & (cr0::WP | cr0::CD | cr0::NW), cr0::WP, "ENT-3");
            assert_eq!((sregs.ldt.unusable, sregs.ldt.present), (1, 0), "ENT-4");
            assert_eq!((sregs.cr3, sregs.apic_base), (0x5000, 0x1234));
        }
    }

    #[test]
    fn tables_are_those_of_the_mode() {
        let layout = Layout::new(2).unwrap().vcpu(1);
        for (cpl, user) in [(0, false), (3, true)] {
            let mut cpu = CpuState::flat_protected_mode(0);
            cpu.cpl = cpl;
            let mut sregs = kvm_sregs::default();
            plan(Doors::closed()).guest_sregs(&cpu, Mpa(0), Some(15), &mut sregs);
            assert_eq!((sregs.gdt.base, sregs.gdt.limit), (UPPER_BASE + layout.gdt(user), 0xffff));
            assert_eq!((sregs.ldt.base, sregs.ldt.limit), (UPPER_BASE + layout.ldt(user), 15));
            assert_eq!((sregs.ldt.type_, sregs.ldt.present, sregs.ldt.unusable), (2, 1, 0));
            assert_eq!((sregs.tr.base, sregs.tr.limit), (UPPER_BASE + layout.tss(), 0x67));
        }
    }

    #[test]
    fn alignment_is_checked_in_user_mode_alone() {
        assert_eq!(entered(&hostile(0), Doors::closed()).cr0 as u32 & cr0::AM, 0);
        assert_ne!(entered(&hostile(3), Doors::closed()).cr0 as u32 & cr0::AM, 0);
    }

    #[test]
    fn time_stamp_traps_when_asked_or_when_the_guest_says_so() {
        let mut free = plan(Doors::closed());
        free.trap_tsc = false;
        let mut cpu = CpuState::flat_protected_mode(0);
        assert_eq!(free.real_cr4(&cpu) & cr4::TSD, 0);
        cpu.cr4 = cr4::TSD;
        assert_eq!(free.real_cr4(&cpu) & cr4::TSD, 0, "TSD does not bind the guest's kernel");
        cpu.cpl = 3;
        assert_ne!(free.real_cr4(&cpu) & cr4::TSD, 0);
    }

    #[test]
    fn each_open_door_changes_what_it_names() {
        let open = |open| entered(&hostile(3), Doors::opened(open));
        let none = OpenDoors::default();
        assert_eq!(open(OpenDoors { no_smep: true, ..none }).cr4 as u32 & cr4::SMEP, 0);
        assert_eq!(open(OpenDoors { no_smap: true, ..none }).cr4 as u32 & cr4::SMAP, 0);
        assert_eq!(open(OpenDoors { no_umip: true, ..none }).cr4 as u32 & cr4::UMIP, 0);
        assert_eq!(open(OpenDoors { native_tsc: true, ..none }).cr4 as u32 & cr4::SMEP, cr4::SMEP);
        assert_eq!(open(OpenDoors { reset_ldt: true, ..none }).ldt.limit, 0xffff);
        assert_ne!(open(OpenDoors { syscall: Some([0, 0]), ..none }).efer & efer::SCE, 0);
        let iopl = plan(Doors::opened(OpenDoors { iopl: true, ..none }));
        assert_eq!(iopl.flags_to_hardware(eflags::IOPL) as u32 & eflags::IOPL, eflags::IOPL);
    }

    #[test]
    fn flags_keep_what_is_the_guests_own() {
        let guest = eflags::IOPL | eflags::ZF | eflags::VIF;
        let back = flags_from_hardware(u64::from(eflags::IF | eflags::CF | eflags::AC), guest);
        assert_eq!(back, eflags::FIXED | eflags::IOPL | eflags::VIF | eflags::CF | eflags::AC);
        let without = flags_from_hardware(u64::from(eflags::IF), eflags::FIXED);
        assert_eq!(without, eflags::FIXED, "the hardware's IF is not the guest's");
    }

    #[test]
    fn limits_are_expressible_and_never_grow() {
        let mut segment = *CpuState::flat_protected_mode(0).segment(Seg::Ds);
        for (limit, want, granular) in [
            (0, 0, 0),
            (0xf_ffff, 0xf_ffff, 0),
            (0x10_0000, 0xf_ffff, 1),
            (0x10_0fff, 0x10_0fff, 1),
            (0x1234_5678, 0x1234_4fff, 1),
            (u32::MAX, u32::MAX, 1),
        ] {
            segment.limit = limit;
            let hardware = to_hardware(&segment, false);
            assert_eq!((hardware.limit, hardware.g), (want, granular), "{limit:#x}");
        }
    }

    #[test]
    fn null_and_absent_segments_are_unusable() {
        let null = to_hardware(&null_segment(2), false);
        assert_eq!((null.unusable, null.present, null.selector), (1, 0, 2));
        let absent = Segment { selector: 0x10, attributes: 0x4013, ..Segment::default() };
        assert_eq!(to_hardware(&absent, false).unusable, 1);
    }

    #[test]
    fn states_that_need_the_interpreter_are_named() {
        let good = CpuState::flat_protected_mode(0);
        assert_eq!(can_run(&good), Ok(()));
        assert_eq!(can_run(&CpuState { cr0: 0, ..good.clone() }), Err(CannotRun::RealMode));
        let v86 = CpuState { eflags: eflags::VM, ..good.clone() };
        assert_eq!(can_run(&v86), Err(CannotRun::Virtual8086));
        assert_eq!(can_run(&CpuState { cpl: 1, ..good.clone() }), Err(CannotRun::PrivilegeLevel(1)));
        let mut bad = good.clone();
        bad.seg[Seg::Cs as usize] = *good.segment(Seg::Ds);
        assert!(matches!(can_run(&bad), Err(CannotRun::CodeSegment(_))));
        let mut bad = good.clone();
        bad.seg[Seg::Ss as usize] = *good.segment(Seg::Cs);
        assert!(matches!(can_run(&bad), Err(CannotRun::StackSegment(_))));
        bad.seg[Seg::Ss as usize] = null_segment(0);
        assert!(matches!(can_run(&bad), Err(CannotRun::StackSegment(_))));
    }

    #[test]
    fn comparison_ignores_what_hardware_does_not_keep() {
        let entered = to_hardware(CpuState::flat_protected_mode(0).segment(Seg::Ds), false);
        assert!(unchanged(&entered, &kvm_segment { g: 0, avl: 1, type_: 2, ..entered }));
        assert!(!unchanged(&entered, &kvm_segment { base: 1, ..entered }));
        assert!(!unchanged(&entered, &kvm_segment { selector: 0x18, ..entered }));
        assert!(!unchanged(&entered, &kvm_segment { unusable: 1, ..entered }));
        assert!(unchanged(
            &UNUSABLE,
            &kvm_segment { base: 7, limit: 9, present: 0, unusable: 0, ..UNUSABLE }
        ));
    }
}
