//! Entering and leaving the guest: traps and the state that goes in and comes back.

use std::sync::Arc;

use umbra::cpu::fpu::Pointers;
use umbra::cpu::{CpuState, Fpu, Seg, Segment, cr0, eflags};
use umbra::kvm::descriptors::decode;
use umbra::kvm::{CannotRun, Host, KvmError, KvmExit, KvmVm, Options, Stop};
use umbra::machine::Pool;
use umbra::probe::scratch::*;
use umbra_mmu::Mfn;

use crate::Body;
use crate::common::*;

/// Every test.
pub const TESTS: &[(&str, Body)] = &[
    ("kvm_each_kind_of_trap_has_its_vector", each_kind_of_trap),
    ("kvm_registers_survive_a_trap", registers_survive),
    ("kvm_registers_changed_by_code_are_seen", registers_change),
    ("kvm_flags_of_the_vmm_are_kept", virtual_flags),
    ("kvm_data_segments_loaded_by_code_are_the_guests", data_segments),
    ("kvm_code_segment_changed_by_a_far_jump_is_the_guests", code_segment),
    ("kvm_stale_stack_segment_reloads_by_a_trap", stale_stack),
    ("kvm_return_from_kernel_to_user_traps", return_to_user),
    ("kvm_ldt_is_the_guests_translated", ldt),
    ("kvm_page_fault_is_repaired_and_goes_on", page_fault),
    ("kvm_single_step_traps_after_one_instruction", single_step),
    ("kvm_state_that_cannot_run_is_refused", cannot_run),
    ("kvm_translation_to_no_memory_is_an_error_with_a_dump", hole),
    ("kvm_pool_too_small_is_an_error", small_pool),
    ("kvm_vcpu_beyond_the_number_is_an_error", no_such_vcpu),
    ("kvm_fpu_stays_with_the_vcpu", fpu),
];

fn each_kind_of_trap(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    /// Its name and code, the vectors and error codes that hosts give for it, and how far EIP has gone.
    type Case = (&'static str, &'static [u8], &'static [(u8, u32)], u32);
    let cases: &[Case] = &[
        ("hlt", &[0xf4], &[(13, 0)], 0),
        ("cli", &[0xfa], &[(13, 0)], 0),
        ("sti", &[0xfb], &[(13, 0)], 0),
        ("mov eax, cr0", &[0x0f, 0x20, 0xc0], &[(13, 0)], 0),
        ("mov cr3, eax", &[0x0f, 0x22, 0xd8], &[(13, 0)], 0),
        ("invlpg [esi]", &[0x0f, 0x01, 0x3e], &[(13, 0)], 0),
        ("lgdt [esi]", &[0x0f, 0x01, 0x16], &[(13, 0)], 0),
        ("lidt [esi]", &[0x0f, 0x01, 0x1e], &[(13, 0)], 0),
        ("wrmsr", &[0x0f, 0x30], &[(13, 0)], 0),
        ("in al, 0x60", &[0xe4, 0x60], &[(13, 0)], 0),
        ("out 0x80, al", &[0xe6, 0x80], &[(13, 0)], 0),
        ("out 0xf0, al: the firmware's own port", &[0xe6, 0xf0], &[(13, 0)], 0),
        ("ud2", &[0x0f, 0x0b], &[(6, 0)], 0),
        ("div ecx, ECX 0", &[0xf7, 0xf1], &[(0, 0)], 0),
        ("mov ds, 0x08: kernel's", &[0xb8, 8, 0, 0, 0, 0x8e, 0xd8], &[(13, 8)], 5),
        ("mov ds, 0x7f8: beyond the table", &[0xb8, 0xf8, 7, 0, 0, 0x8e, 0xd8], &[(13, 0x7f8)], 5),
        // Silicon says vector * 8 + 2, TCG vector * 16 + 2, an emulator #UD.
        ("int 0x80", &[0xcd, 0x80], &[(13, 0x402), (13, 0x802), (6, 0)], 0),
        ("int3", &[0xcc], &[(13, 0x1a), (13, 0x32), (6, 0)], 0),
        ("read absent", &[0xa1, 0, 0, 0x40, 0], &[(14, 4)], 0),
        ("write absent", &[0xa3, 0, 0, 0x40, 0], &[(14, 6)], 0),
    ];
    for (name, code, wanted, gone) in cases {
        let exit = run(&mut scratch, code)?;
        let met = wanted.iter().any(|&(vector, error)| trapped(exit, vector, error));
        check!(met && scratch.cpu.eip == CODE.0 + gone, "{name}: {exit:x?} at {:#x}", scratch.cpu.eip);
    }
    let exit = run(&mut scratch, &[0xa1, 0x34, 0x12, 0x40, 0])?;
    check!(matches!(exit, KvmExit::Trap { cr2: 0x40_1234, .. }), "CR2: {exit:x?}");
    scratch.load(&[], true).map_err(text)?;
    scratch.cpu.eip = ABSENT.0;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 0x14), "fetch from an absent page: {exit:x?}");
    scratch.space.map(ABSENT, scratch.data, ALL | NO_EXECUTE).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 0x15), "fetch from an NX page: {exit:x?}");
    Ok(())
}

fn registers_survive(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    for user in [true, false] {
        scratch.load(&[HLT], user).map_err(text)?;
        scratch.cpu.gpr = [0xdead_beef, 1, 0x8000_0000, u32::MAX, STACK_END.0, 5, 6, 7];
        scratch.cpu.eflags = eflags::FIXED | eflags::CF | eflags::OF | eflags::DF | eflags::SF | eflags::IF;
        scratch.cpu.cr2 = 0x1234;
        let before = scratch.cpu.clone();
        let exit = enter(&mut scratch)?;
        // The CPU saves RF with a fault, so that returning to it does not break again.
        scratch.cpu.eflags &= !eflags::RF;
        check!(halted(exit), "user {user}: {exit:?}");
        check!(scratch.cpu == before, "user {user}: {:x?}\nwas {before:x?}", scratch.cpu);
    }
    Ok(())
}

fn registers_change(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // inc eax; xchg ecx, edx; push ebx; add esi, esi (sets CF); std; hlt
    let exit = {
        scratch.load(&[0x40, 0x87, 0xca, 0x53, 0x01, 0xf6, 0xfd, HLT], true).map_err(text)?;
        scratch.cpu.gpr = [u32::MAX, 1, 2, 3, STACK_END.0, 5, 0x8000_0000, 7];
        enter(&mut scratch)?
    };
    let cpu = &scratch.cpu;
    check!(halted(exit), "{exit:?}");
    check!(cpu.gpr == [0, 2, 1, 3, STACK_END.0 - 4, 5, 0, 7], "{:x?}", cpu.gpr);
    check!(cpu.eip == CODE.0 + 7, "{:#x}", cpu.eip);
    let set = cpu.eflags & (eflags::CF | eflags::ZF | eflags::DF | eflags::SF);
    check!(set == eflags::CF | eflags::ZF | eflags::DF, "{:#x}", cpu.eflags);
    Ok(())
}

fn virtual_flags(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    for own in [0, eflags::IF, eflags::IOPL, eflags::IF | eflags::IOPL] {
        // pushf; pop eax; or eax, IF | IOPL; push eax; popf; hlt: POPF at CPL 3 changes neither.
        let code = [0x9c, 0x58, 0x0d, 0x00, 0x32, 0, 0, 0x50, 0x9d, HLT];
        scratch.load(&code, true).map_err(text)?;
        scratch.cpu.eflags = eflags::FIXED | own;
        let exit = enter(&mut scratch)?;
        let now = scratch.cpu.eflags & (eflags::IF | eflags::IOPL | eflags::VM);
        check!(halted(exit) && now == own, "{own:#x}: {:#x} {exit:?}", scratch.cpu.eflags);
    }
    Ok(())
}

/// A writable data segment with DPL `dpl`, base 0x0020_0000 (the data page) and limit 0xfff.
fn small_data(dpl: u64) -> u64 {
    0x0040_9220_0000_0fff | dpl << 45
}

fn data_segments(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let gdt = [&GDT[..], &[small_data(0), small_data(3)]].concat();
    scratch.set_gdt(&gdt).map_err(text)?;
    for (user, selector) in [(true, 0x33u16), (true, 0x30), (false, 0x28), (false, 0x30)] {
        let [low, high] = selector.to_le_bytes();
        // mov eax, selector; mov fs, eax; mov dword fs:[8], 7; xor eax, eax; mov gs, eax; hlt
        let code = [
            &[0xb8, low, high, 0, 0, 0x8e, 0xe0][..],
            &[0x64, 0xc7, 0x05, 8, 0, 0, 0, 7, 0, 0, 0],
            &[0x31, 0xc0, 0x8e, 0xe8, HLT],
        ]
        .concat();
        scratch.space.pool().store(scratch.data.at(8), 0).map_err(text)?;
        scratch.load(&code, user).map_err(text)?;
        let ds = *scratch.cpu.segment(Seg::Ds);
        let exit = enter(&mut scratch)?;
        check!(halted(exit), "{selector:#x}: {exit:x?}");
        check!(scratch.data_word(8).map_err(text)? == 7, "{selector:#x}: the base was not used");
        let own = decode(selector, gdt[usize::from(selector >> 3)]);
        let want = Segment { attributes: own.attributes | 1, ..own };
        check!(*scratch.cpu.segment(Seg::Fs) == want, "{selector:#x}: {:x?}", scratch.cpu.segment(Seg::Fs));
        let gs = scratch.cpu.segment(Seg::Gs);
        check!(gs.unusable && gs.selector == 0, "null: {gs:x?}");
        check!(*scratch.cpu.segment(Seg::Ds) == ds, "what nobody loaded stays");
        // And once more through an entry: the null register and the loaded one are entered as they are.
        let before = scratch.cpu.clone();
        enter(&mut scratch)?;
        scratch.cpu.eflags = before.eflags;
        check!(scratch.cpu == before, "second entry: {:x?}", scratch.cpu.seg);
    }
    Ok(())
}

fn code_segment(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // A second kernel code segment, base 0x0010_0000.
    let code_at_page = 0x00cf_9b10_0000_ffff;
    scratch.set_gdt(&[&GDT[..], &[code_at_page]].concat()).map_err(text)?;
    // jmp 0x28:7; (7) hlt
    scratch.load(&[0xea, 7, 0, 0, 0, 0x28, 0, HLT], false).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(halted(exit), "{exit:x?}");
    let cs = scratch.cpu.segment(Seg::Cs);
    check!(*cs == decode(0x28, code_at_page), "{cs:x?}");
    check!(scratch.cpu.eip == 7 && scratch.cpu.cpl == 0, "{:#x}", scratch.cpu.eip);
    Ok(())
}

fn stale_stack(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // mov eax, 0x23; mov ss, eax; hlt, while SS holds what selector 0x23 no longer means.
    let reload = [0xb8, USER_DATA as u8, 0, 0, 0, 0x8e, 0xd0, HLT];
    scratch.load(&reload, true).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(halted(exit) && scratch.cpu.eip == CODE.0 + 7, "fresh: {exit:x?} {:#x}", scratch.cpu.eip);
    let mut gdt = GDT;
    gdt[4] = small_data(3);
    scratch.set_gdt(&gdt).map_err(text)?;
    scratch.load(&reload, true).map_err(text)?;
    let old = *scratch.cpu.segment(Seg::Ss);
    let exit = enter(&mut scratch)?;
    check!(scratch.cpu.eip == CODE.0 + 5, "stale: {exit:x?} {:#x}", scratch.cpu.eip);
    check!(*scratch.cpu.segment(Seg::Ss) == old, "{:x?}", scratch.cpu.segment(Seg::Ss));
    // The VMM does the load; then it is fresh and goes natively.
    scratch.cpu.seg[Seg::Ss as usize] = decode(USER_DATA, gdt[4] | 1 << 40);
    let exit = enter(&mut scratch)?;
    check!(halted(exit) && scratch.cpu.eip == CODE.0 + 7, "reloaded: {exit:x?} {:#x}", scratch.cpu.eip);
    Ok(())
}

fn return_to_user(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // push USER_DATA; push STACK_END; push 0x202; push USER_CODE; push CODE; iretd, at virtual CPL 0.
    let code = [
        &[0x6a, USER_DATA as u8, 0x68, 0, 0, 9, 0, 0x68, 2, 2, 0, 0, 0x6a, USER_CODE as u8][..],
        &[0x68, 0, 0, 0x10, 0, 0xcf],
    ]
    .concat();
    scratch.load(&code, false).map_err(text)?;
    let exit = enter(&mut scratch)?;
    let selector = u32::from(USER_CODE & !3);
    let at_iret = scratch.cpu.eip == CODE.0 + code.len() as u32 - 1;
    // An emulator may name no selector; TCG pops a frame with the kernel's rights, which SMAP refuses.
    let wanted = trapped(exit, 13, selector) || trapped(exit, 13, 0) || trapped(exit, 14, 1);
    check!(at_iret && wanted, "{exit:x?} {:#x}", scratch.cpu.eip);
    // jmp 0x08:.. from user mode: the kernel's code is hidden.
    let exit = run(&mut scratch, &[0xea, 0, 0, 0x10, 0, KERNEL_CODE as u8, 0])?;
    check!(scratch.cpu.eip == CODE.0, "{exit:x?} {:#x}", scratch.cpu.eip);
    Ok(())
}

fn ldt(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let ldt = table_bytes(&[0, small_data(3)]);
    // mov eax, 0x0f; mov es, eax; mov dword es:[8], 9; hlt
    let code = [0xb8, 0x0f, 0, 0, 0, 0x8e, 0xc0, 0x26, 0xc7, 0x05, 8, 0, 0, 0, 9, 0, 0, 0, HLT];
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 13, 0x0c), "without an LDT: {exit:x?}");
    scratch.vcpu.set_descriptors(&table_bytes(&GDT), Some(&ldt)).map_err(text)?;
    let exit = run(&mut scratch, &code)?;
    check!(halted(exit) && scratch.data_word(8).map_err(text)? == 9, "with one: {exit:x?}");
    check!(*scratch.cpu.segment(Seg::Es) == decode(0x0f, small_data(3) | 1 << 40), "{:x?}", scratch.cpu.seg);
    scratch.vcpu.set_descriptors(&table_bytes(&GDT), None).map_err(text)?;
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 13, 0x0c), "and without again: {exit:x?}");
    Ok(())
}

fn page_fault(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    // mov eax, [ABSENT]; mov [esi], eax; mov [ABSENT], ebx; hlt
    let code = [0xa1, 0, 0, 0x40, 0, 0x89, 0x06, 0x89, 0x1d, 0, 0, 0x40, 0, HLT];
    let exit = run(&mut scratch, &code)?;
    check!(trapped(exit, 14, 4), "{exit:x?}");
    let frame = scratch.space.frame().map_err(text)?;
    scratch.space.pool().store(frame.at(0), 0x5555_aaaa).map_err(text)?;
    scratch.space.map(ABSENT, frame, PRESENT | USER).map_err(text)?;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 14, 7), "then read-only: {exit:x?}");
    check!(scratch.data_word(0).map_err(text)? == 0x5555_aaaa, "what was read");
    scratch.space.map(ABSENT, frame, ALL).map_err(text)?;
    scratch.cpu.gpr[3] = 0x77;
    let exit = enter(&mut scratch)?;
    let stored = scratch.space.pool().load(frame.at(0)).map_err(text)?;
    check!(halted(exit) && stored == 0x77, "then writable: {exit:x?} {stored:#x}");
    Ok(())
}

fn single_step(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[0x40, 0x40, HLT], true).map_err(text)?;
    scratch.cpu.eflags |= eflags::TF;
    scratch.cpu.dr[6] = 0xffff_0ff0;
    for step in 1..=2 {
        let exit = enter(&mut scratch)?;
        let cpu = &scratch.cpu;
        check!(trapped(exit, 1, 0) && cpu.gpr[0] == step, "step {step}: {exit:?} eax {}", cpu.gpr[0]);
        check!(cpu.eip == CODE.0 + step, "step {step}: {:#x}", cpu.eip);
        check!(cpu.dr[6] & 1 << 14 != 0, "BS in DR6: {:#x}", cpu.dr[6]);
    }
    Ok(())
}

fn cannot_run(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    scratch.load(&[HLT], true).map_err(text)?;
    let good = scratch.cpu.clone();
    let cases = [
        (CpuState { cr0: good.cr0 & !cr0::PE, ..good.clone() }, CannotRun::RealMode),
        (CpuState { eflags: good.eflags | eflags::VM, ..good.clone() }, CannotRun::Virtual8086),
        (CpuState { cpl: 2, ..good.clone() }, CannotRun::PrivilegeLevel(2)),
    ];
    for (state, reason) in cases {
        scratch.cpu = state.clone();
        let error = scratch.enter();
        check!(matches!(error, Err(KvmError::CannotRun(r)) if r == reason), "{error:?}");
        check!(scratch.cpu == state, "the state has changed");
    }
    Ok(())
}

fn hole(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    let beyond = Mfn(scratch.space.pool().frames() as u32 + 5);
    scratch.space.map(ABSENT, beyond, ALL).map_err(text)?;
    scratch.load(&[0xa1, 8, 0, 0x40, 0, HLT], true).map_err(text)?;
    match scratch.enter() {
        Err(error @ KvmError::Stopped { .. }) => {
            let message = error.to_string();
            check!(message.contains("not in the pool") && message.contains("cr3"), "{message}");
            let KvmError::Stopped { why: Stop::Hole { address, write: false, .. }, .. } = error else {
                return Err(message);
            };
            check!(address == beyond.at(8).0, "{address:#x}");
            Ok(())
        }
        other => Err(format!("{other:?}")),
    }
}

fn small_pool(host: &Host) -> Test {
    let pool = Arc::new(Pool::new(3).map_err(text)?);
    let error = KvmVm::new(host, pool, Options::default()).err().map(text).unwrap_or_default();
    check!(error.contains("make the pool larger"), "{error}");
    Ok(())
}

fn no_such_vcpu(host: &Host) -> Test {
    let scratch = guest(host)?;
    let error = scratch.vm.create_vcpu(1).err().map(text).unwrap_or_default();
    check!(error.contains("no vCPU 1"), "{error}");
    Ok(())
}

fn fpu(host: &Host) -> Test {
    let mut scratch = guest(host)?;
    const PATTERN: u128 = 0x5a5a_5a5a_5a5a_5a5a << 64 | 0x5a5a_5a5a_5a5a_5a5a;
    let mut wanted = scratch.vcpu.fpu().map_err(text)?;
    check!(wanted == Fpu::default(), "{wanted:x?}");
    wanted.set_xmm(0, PATTERN);
    check!(wanted.set_mxcsr(0x3fa5), "legal");
    wanted.set_words(0x0b7f, 0x3120);
    wanted.set_tag_word(0x3fff);
    wanted.set_st(0, 0x4000_c90f_daa2_2168_c235);
    wanted.set_pointers(Pointers { opcode: 0x123, ip: 0x1000, cs: 0, dp: 0x2000, ds: 0 });
    scratch.vcpu.set_fpu(&wanted).map_err(text)?;
    check!(scratch.vcpu.fpu().map_err(text)? == wanted, "read back: {:x?}", scratch.vcpu.fpu());
    // movups [esi], xmm0; hlt
    let exit = run(&mut scratch, &[0x0f, 0x11, 0x06, HLT])?;
    let stored = scratch.data_word(8).map_err(text)?;
    check!(halted(exit) && stored == 0x5a5a_5a5a_5a5a_5a5a, "{exit:?} {stored:#x}");
    let after = scratch.vcpu.fpu().map_err(text)?;
    check!((after.st(0), after.xmm(0)) == (wanted.st(0), PATTERN), "after an exit: {after:x?}");
    let words = |fpu: &Fpu| (fpu.control(), fpu.status(), fpu.tags(), fpu.mxcsr());
    check!(words(&after) == words(&wanted), "after an exit: {after:x?}");
    // With TS set the same instruction traps.
    scratch.load(&[0x0f, 0x11, 0x06, HLT], true).map_err(text)?;
    scratch.cpu.cr0 |= cr0::TS;
    let exit = enter(&mut scratch)?;
    check!(trapped(exit, 7, 0) && scratch.cpu.eip == CODE.0, "{exit:?}");
    Ok(())
}
